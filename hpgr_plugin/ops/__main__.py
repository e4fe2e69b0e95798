"""python -m hpgr_plugin.ops: every operator, its backends, and why one is not usable here."""

import importlib
import pkgutil
import warnings

from hpgr_plugin import ops
from hpgr_plugin.ops.dispatch import operators


def report() -> str:
    """One line for each backend of each operator."""
    for module in pkgutil.iter_modules(ops.__path__):
        if module.name != "__main__":
            importlib.import_module(f"{ops.__name__}.{module.name}")
    lines = [f"{'operator':<18} {'backend':<8} usable here"]
    for name, operator in sorted(operators().items()):
        for backend in operator.backends.values():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reason = backend.here()
            when = "yes" if backend.automatic else "yes, when named"
            answer = when if reason is None else f"no: {reason}"
            lines.append(f"{name:<18} {backend.name:<8} {answer}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
