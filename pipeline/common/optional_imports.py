"""Import libraries from the optional dependency groups."""

from importlib import import_module
from types import ModuleType

from pipeline.common.errors import UserError

# Package and extra (pyproject.toml) of each module.
PACKAGES = {
    "sklearn": ("scikit-learn", "evaluation"),
    "scipy": ("scikit-learn", "evaluation"),
    "lingua": ("lingua-language-detector", "evaluation"),
    "babel": ("babel", "evaluation"),
    "lm_eval": ("lm-eval", "evaluation"),
    "openai": ("openai", "evaluation"),
    "math_verify": ("math-verify", "evaluation"),
    "liger_kernel": ("liger-kernel", "kernels"),
    "peft": ("peft", "adapters"),
    "trl": ("trl", "bench"),
}


def import_optional(module: str) -> ModuleType:
    """Import and return a module of an optional library, such as "sklearn.metrics".

    Raises:
        UserError: The library is not installed; the message names the package and its extra.
    """
    top_level = module.partition(".")[0]
    package, extra = PACKAGES[top_level]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != top_level:
            raise
        raise UserError(
            f"{package} is not installed; install it with `pip install {package}`, or install the `{extra}` extra"
        ) from None
