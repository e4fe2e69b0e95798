"""The packages that the host needs: which are pinned, which are installed, and whether they fit."""

import importlib.metadata
import re
from collections.abc import Iterator

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts import contract
from hpgr_plugin.hosts.requirements import DLRM_V3, RESEARCH

NO_DEPS_EXTRA = "host-no-deps"
_DISTRIBUTION = "hpgr-plugin"
_ADAPTERS = {"hpgr_plugin.hosts.dlrm_v3": DLRM_V3, "hpgr_plugin.hosts.research": RESEARCH}


def requirements_of(extra: str) -> list[str]:
    """The requirements of one extra, such as "torchrec==1.9.0".

    Raises:
        HpgrError: this package is not installed, so that its extras are not known.
    """
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise HpgrError(f"{_DISTRIBUTION} is not installed: pip install --editable .") from error
    normalized = extra.replace("-", "[-_]")
    return [text.partition(";")[0].strip() for text in requirements if _is_of(text, normalized)]


def lines_of_report() -> Iterator[str]:
    """The host's commit, the contract of every adapter, and the versions of its packages.

    Raises:
        HostContractError: no host, a missing package, or a name that the host lacks.
    """
    for adapter, requirements in _ADAPTERS.items():
        contract.require(adapter, requirements)
    yield f"host: {contract.host_version()}"
    for adapter, requirements in _ADAPTERS.items():
        yield f"{adapter}: {len(requirements)} names of the host, all there"
    pinned = dict(_pins())
    for name in ("torch", *contract.PIP_NAMES.values()):
        yield _version_line(name, pinned.get(name))


def _is_of(requirement: str, extra: str) -> bool:
    return re.search(rf"extra == ['\"]{extra}['\"]", requirement) is not None


def _pins() -> Iterator[tuple[str, str]]:
    try:
        texts = requirements_of("host") + requirements_of(NO_DEPS_EXTRA)
    except HpgrError:  # run from a checkout on PYTHONPATH
        return
    for text in texts:
        name, is_pinned, version = text.partition("==")
        if is_pinned:
            yield name, version


def _version_line(name: str, pinned: str | None) -> str:
    installed = next(filter(None, map(_version, (name, name.removesuffix("-cpu")))), None)
    if installed is None:
        return f"{name}: version unknown"
    differs = pinned is not None and installed.partition("+")[0] != pinned
    return f"{name} {installed}" + (f" (setup.cfg pins {pinned})" if differs else "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
