"""Write the model of a served folder as an exported program, or as a compiled package.

python -m hpgr_plugin.serving.package --model=FOLDER --out=FILE.pt2 [--compiled]
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hpgr_plugin.errors import HpgrError, one_line
from hpgr_plugin.serving.folder import read_folder
from hpgr_plugin.serving.program import export_program

_LOAD = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(prog="python -m hpgr_plugin.serving.package")
    parser.add_argument("--model", required=True, type=Path, help="folder of serving.export")
    parser.add_argument("--out", required=True, type=Path, help="file, ends in .pt2")
    parser.add_argument("--device", default=None, help="default: a GPU, if there is one")
    parser.add_argument("--compiled", action="store_true", help="by AOTInductor: takes minutes")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".pt2":
        parser.error(f"--out takes a file that ends in .pt2, got {options.out}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        write_program(options.model, options.out, device=device, compiled=options.compiled)
    except (HpgrError, OSError) as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)
    print(f"wrote {options.out}")
    if options.compiled and (problem := why_not_loaded(options.out)):
        print("warning:", problem, file=sys.stderr)


def write_program(folder: Path, out: Path, *, device: str = "cpu", compiled: bool = False) -> None:
    """Write the model of a served folder as one file.

    Args:
        folder: of `hpgr_plugin.serving.export`.
        out: file that ends in ".pt2".
        device: that it runs on.
        compiled: a package of AOTInductor instead of an exported program.

    Raises:
        FolderError: no such folder, or a damaged one.
        ProgramError: a part of the model has no form with fixed shapes.
    """
    model = read_folder(folder).model.to(device)
    program = export_program(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    if compiled:
        torch._inductor.aoti_compile_and_package(program, package_path=str(out))
    else:
        torch.export.save(program, str(out))


def why_not_loaded(package: Path) -> str | None:
    """Load a compiled package in a process of its own: what goes wrong and what helps, or None."""
    loaded = subprocess.run(
        [sys.executable, "-c", _LOAD, str(package)], capture_output=True, text=True, check=False
    )
    if not loaded.returncode:
        return None
    if loaded.returncode == -signal.SIGSEGV:
        return (
            f"loading {package} ends in a segmentation fault here; start Python with "
            "LD_PRELOAD=$(g++ -print-file-name=libstdc++.so.6), which helped where torch and the "
            "package disagree about the C++ library"
        )
    last = loaded.stderr.strip().rpartition("\n")[2]
    return f"{package} cannot be loaded here: {last or f'exit status {loaded.returncode}'}"


if __name__ == "__main__":
    main()
