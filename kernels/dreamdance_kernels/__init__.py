"""The attention functions of DreamDance behind one signature each, whatever computes them (contract C2)."""
