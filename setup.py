"""The package, and as bingo/_workspace the files of this clone that `bingo init` copies into an empty folder."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["bingo*"]), "bingo._workspace"], package_dir={"bingo._workspace": "."})
