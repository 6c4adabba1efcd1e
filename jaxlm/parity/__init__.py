"""Compares a function in JAX with the same in torch: is the difference rounding, and if not, where does it begin?"""

from jaxlm.parity.compare import compare
from jaxlm.parity.models import check, check_import, random_params
from jaxlm.parity.report import Divergence, Report, summary

__all__ = ["Divergence", "Report", "check", "check_import", "compare", "random_params", "summary"]
