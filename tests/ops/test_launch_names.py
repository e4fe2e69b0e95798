"""Names that Triton's launcher takes for itself."""

import ast
from pathlib import Path

import hpgr_plugin.ops

RESERVED = {"grid", "warmup", "stream", "num_warps", "num_stages", "num_ctas", "device"}


def test_no_kernel_has_an_argument_that_the_launcher_takes() -> None:
    kernels = 0
    for path in Path(hpgr_plugin.ops.__path__[0]).rglob("*kernels.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                kernels += 1
                names = {argument.arg for argument in node.args.args}
                assert not names & RESERVED, f"{path.name}: {node.name}"
    assert kernels > 10
