"""Runs in the CUDA image, without a GPU: what every package of the lock is good for there, as one JSON.

For each distribution its version, the modules that were imported, and what failed; for each shared library of CUDA why
it does not load; and how many bytes of machine code a kernel of Triton becomes.
"""

import ctypes
import importlib
import importlib.metadata
import json
import re
import sys
import traceback
from pathlib import Path

SUFFIXES = (".py", ".abi3.so", f".{sys.implementation.cache_tag}-x86_64-linux-gnu.so")


def main():
    """Import all, load all, compile one kernel."""
    ours = [each for each in importlib.metadata.distributions() if "/opt/venv/" in str(each.locate_file(""))]
    packages = {re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower(): about(each) for each in ours}
    found = {"packages": packages, "libraries": libraries(), "torch": torch_s(), "kernel_bytes": kernel()}
    print(json.dumps(found))  # noqa: T201 - it is what the test reads


def about(distribution):
    """Version, modules, and the last line of each failed import."""
    failed = {}
    modules = sorted(modules_of(distribution))
    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException as error:  # noqa: BLE001 - also one that ends the process
            failed[module] = "".join(traceback.format_exception_only(error)).strip()
    return {"version": distribution.version, "modules": modules, "failed": failed}


def modules_of(distribution):
    """The highest that can be imported: packages below a namespace, single files, extensions."""
    files = [path for path in distribution.files or () if path.name.endswith(SUFFIXES) and ".." not in path.parts]
    packages = {path.parent.parts for path in files if path.name == "__init__.py"}
    modules = {(*path.parent.parts, path.name.split(".")[0]) for path in files}
    names = {parts for parts in packages | modules if all(part.isidentifier() for part in parts)}
    return {".".join(parts) for parts in names if not any(parts[:depth] in packages for depth in range(len(parts)))}


def libraries():
    """Each shared library below nvidia/ and of bitsandbytes for this CUDA -> why it does not load, or None."""
    import torch

    site = Path(torch.__file__).parents[1]
    found = [path for path in (site / "nvidia").rglob("*.so*") if not path.is_symlink()]
    found += site.glob(f"bitsandbytes/libbitsandbytes_cuda{torch.version.cuda.replace('.', '')}.so")
    return {str(path.relative_to(site)): why_not(path) for path in sorted(found)}


def why_not(path):
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    return None


def torch_s():
    import torch

    return {"cuda": torch.version.cuda, "version": torch.__version__, "available": torch.cuda.is_available()}


def kernel():
    """Compiled for a Hopper GPU by Triton's own ptxas; none need be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sys.path.insert(0, "/work")
    Path("/work/kernel.py").write_text(
        "import triton, triton.language as tl\n\n\n@triton.jit\ndef double(x, n, block: tl.constexpr):\n"
        "    at = tl.program_id(0) * block + tl.arange(0, block)\n"
        "    tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)\n"
    )
    source = ASTSource(
        fn=importlib.import_module("kernel").double,
        signature={"x": "*fp32", "n": "i32", "block": "constexpr"},
        constexprs={"block": 128},
    )
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])


main()
