"""Libraries that only the instruments need, imported when they are called for."""

from importlib import import_module
from types import ModuleType

from pipeline.common.errors import UserError

PACKAGES = {
    "sklearn": "scikit-learn",
    "scipy": "scikit-learn",
    "lingua": "lingua-language-detector",
    "lm_eval": "lm-eval",
}


def import_optional(module: str) -> ModuleType:
    """Import `module` ("sklearn.metrics"). Raises UserError, naming the package and its extra, where it is absent."""
    package = PACKAGES[module.partition(".")[0]]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise UserError(
            f"{package} is not installed; it belongs to the extra `evaluation`: pip install {package}"
        ) from None
