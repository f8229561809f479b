"""The Deep Learning Atlas: every method of ICLR 2018 in one PyTorch library.

Import a method from its part, for instance ``from dlatlas.theory.amsgrad import AMSGrad``; find methods with
``dlatlas.catalog`` or ``python -m dlatlas search WORD``. Importing the package itself loads nothing heavy.
"""

__version__ = "0.1.0"
