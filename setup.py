"""Finds the packages: setup.cfg's `find:` looks into one root only, and the kernels have one of their own."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["dreamdance", "dreamdance.*"]),
        *find_packages("kernels", include=["dreamdance_kernels", "dreamdance_kernels.*"]),
    ],
    package_dir={"dreamdance_kernels": "kernels/dreamdance_kernels"},
)
