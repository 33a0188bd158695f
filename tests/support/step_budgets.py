"""The tool `tools/step_budgets.py` as a module, loaded once."""

from support.tool_modules import load_tool

budgets = load_tool("step_budgets")
