"""Build hook: the cffi module from native/, and libscif.so.0 when its sources are there."""

from setuptools import setup

setup(cffi_modules=["native/build_native.py:ffi"])
