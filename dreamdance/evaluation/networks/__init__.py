"""The pretrained networks of LPIPS, FVD and FID-VID. Weights are read from a folder; nothing is downloaded."""
