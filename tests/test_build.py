"""What is built: an ops library for every torch, kernels that stay in their isa, a wheel that needs no compiler."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import pykernels
from pykernels import _host
from pykernels.ops import _load, names

ROOT = pathlib.Path(__file__).parent.parent
ISAS = list(_host.isas())


def output(*command: str | os.PathLike[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def library(name: str = "pykernels_cpu") -> pathlib.Path:
    path = _load.library_path(name)
    assert path is not None
    return path


def build_folder() -> pathlib.Path:
    """Where the objects of this installation were compiled: inside its environment, or in the checkout."""
    folders = (pathlib.Path(sys.prefix) / "build", ROOT / "build")
    found = [folder for folder in folders if (folder / "CMakeFiles").is_dir()]
    if not found:
        pytest.skip("installed from a wheel: its object files are not here")
    return found[0]


def objects(target: str) -> list[pathlib.Path]:
    found = sorted((build_folder() / "CMakeFiles" / f"{target}.dir").rglob("*.o"))
    assert found, f"no object files of {target}"
    return found


def python(code: str, site: pathlib.Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; with `site`, that folder's pykernels and no other installation of it."""
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    if site is not None:
        command.insert(1, "-S")  # an editable installation comes in through site
        packages = pathlib.Path(torch.__file__).parent.parent
        env["PYTHONPATH"] = f"{site}{os.pathsep}{packages}"
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=site)


# ---- the libraries ---------------------------------------------------------------------------------------------------
OPS_LIBRARIES = [name for name in ("pykernels_cpu", "pykernels_cuda") if _load.library_path(name)]


@pytest.mark.parametrize("name", OPS_LIBRARIES)
def test_ops_library_needs_only_the_stable_abi_and_the_c_plus_plus_runtime(name: str) -> None:
    undefined = {line.split()[-1] for line in output("nm", "-D", "--undefined-only", library(name)).splitlines()}
    runtime = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+$|__gmon_start__$|_ITM_\w+$")
    shims = re.compile(r"(aoti_torch|torch)_\w+$")
    sanitizer = re.compile(r"__(a|ub)san_\w+$" if _host.build()["sanitizers"] else r"(?!)")
    foreign = {name for name in undefined if not (runtime.match(name) or shims.match(name) or sanitizer.match(name))}
    assert not foreign
    assert any(shims.match(name) for name in undefined)


@pytest.mark.parametrize("name", OPS_LIBRARIES)
def test_ops_library_exports_nothing(name: str) -> None:
    assert not output("nm", "-D", "--defined-only", library(name)).split()


@pytest.mark.parametrize("name", [*OPS_LIBRARIES, "_host"])
def test_library_names_no_folder_of_the_build_machine(name: str) -> None:
    path = pathlib.Path(_host.__file__) if name == "_host" else library(name)
    dynamic = output("readelf", "-d", path)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    if not _host.build()["sanitizers"]:  # debug information names folders
        assert str(ROOT).encode() not in path.read_bytes()


@pytest.mark.skipif("pykernels_cuda" not in OPS_LIBRARIES, reason="the CUDA library was not built")
def test_cuda_library_needs_no_cuda_library() -> None:
    """The runtime stands inside; torch's CUDA libraries are looked up when an op is called."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library("pykernels_cuda")))
    assert not [name for name in needed if "cuda" in name or "cudart" in name or "cublas" in name]
    assert "libtorch_cpu.so" in needed


def test_a_cpu_torch_does_not_load_the_cuda_library() -> None:
    code = "from pykernels.ops import _load; print(_load.CUDA_ERROR)"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert (torch.version.cuda is None) == ("is built without CUDA" in done.stdout)


def test_host_module_needs_no_torch() -> None:
    assert "torch" not in output("readelf", "-d", _host.__file__)


# ---- isas ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
def test_isa_objects_share_no_inline_function(isa: str) -> None:
    """A weak copy of a shared inline built for this isa could be the one the linker keeps: SIGILL on an older CPU."""
    own = f"9pykernels{len(isa)}{isa}"
    for file in objects(f"kernels_{isa}"):
        entries = [line.split() for line in output("nm", "--defined-only", file).splitlines() if line.strip()]
        shared = [name for *_, kind, name in entries if kind in "WVuT" and own not in name]
        assert not shared, f"{file.name} defines {shared} outside namespace pykernels::{isa}"


@pytest.mark.parametrize(
    ("target", "forbidden"),
    [
        ("pykernels_cpu", "[yz]mm"),
        ("_host", "[yz]mm"),
        ("kernels_scalar", "[yz]mm"),
        ("kernels_avx2", "zmm"),
        ("kernels_avxvnni", "zmm"),
    ],
)
def test_vector_registers_stay_in_their_isa(target: str, forbidden: str) -> None:
    for file in objects(target):
        wide = re.findall(rf"^.*%{forbidden}\d+.*$", output("objdump", "-d", file), re.MULTILINE)
        assert not wide, f"{file.name}: {wide[0].strip()}"


SHOW_ISA = "import torch, pykernels; print(torch.ops.pykernels._isa())"
# Plain C++, the best isa that runs here, the best that does not.
ONE_OF_EACH = ["scalar", *{runs: isa for isa, runs in _host.isas().items()}.values()]


@pytest.mark.parametrize("isa", ONE_OF_EACH)
def test_environment_chooses_the_isa(isa: str) -> None:
    done = python(SHOW_ISA, PYKERNELS_ISA=isa)
    assert done.returncode == 0, done.stderr
    if _host.isas()[isa]:
        assert done.stdout.strip() == isa
        assert "PYKERNELS_ISA" not in done.stderr
    else:
        assert done.stdout.strip() != isa
        assert "PYKERNELS_ISA names an isa that this CPU does not have" in done.stderr


def test_unknown_isa_is_told_and_another_one_runs() -> None:
    done = python(SHOW_ISA, PYKERNELS_ISA="avx1024")
    assert done.stdout.strip() in ISAS
    assert f"PYKERNELS_ISA must be one of {', '.join(names.ISAS)}" in done.stderr


def test_set_isa_names_what_it_takes() -> None:
    with pytest.raises(RuntimeError, match=r"_set_isa: isa must be one of .*not 'neon'"):
        torch.ops.pykernels._set_isa("neon")


# ---- which libraries are built --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("choice", "given", "cuda", "said"),
    [
        ("auto", "environment", None, "CUDA library: off, since torch is built without CUDA"),
        ("auto", "define", "12.8", "CUDA library: off, since .*(nvcc|CUTLASS)"),
        ("off", "environment", "12.8", "CUDA library: off, as PYKERNELS_CUDA says"),
        ("on", "environment", None, "PYKERNELS_CUDA=on, but .*(nvcc|CUTLASS)"),
        ("ON", "define", None, "PYKERNELS_CUDA=on, but .*(nvcc|CUTLASS)"),
    ],
)
def test_the_cuda_library_is_built_where_torch_has_cuda_or_when_asked_for(
    choice: str, given: str, cuda: str | None, said: str, tmp_path: pathlib.Path
) -> None:
    """Beside a torch of which only the version is there, and without CUTLASS: nvcc makes no difference."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    cmake = shutil.which("cmake", path=path)
    if cmake is None or shutil.which("ninja", path=path) is None:
        pytest.skip("needs the extra `build`")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text(f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n")
    packages = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": packages, "PYKERNELS_CUDA": ""}
    options = [f"-DPYKERNELS_CUTLASS={tmp_path / 'none'}", f"-DPython_EXECUTABLE={sys.executable}"]
    if given == "environment":
        environment["PYKERNELS_CUDA"] = choice
    else:
        options.append(f"-DPYKERNELS_CUDA={choice}")
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    told = re.sub(r"\s+", " ", done.stdout + done.stderr)
    assert re.search(said, told), told
    assert (done.returncode == 0) == (choice.lower() != "on"), told


# ---- what is said when the library cannot be used --------------------------------------------------------------------
def python_files(target: pathlib.Path) -> pathlib.Path:
    """The package without any library, as a checkout that was never built."""
    shutil.copytree(ROOT / "pykernels", target / "pykernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def test_import_without_the_library_succeeds_and_the_call_says_what_to_do(tmp_path: pathlib.Path) -> None:
    code = "import torch, pykernels\nprint('imported')\ntorch.ops.pykernels.int8_mm(torch.ones(1), torch.ones(1))"
    done = python(code, python_files(tmp_path))
    assert "imported" in done.stdout, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: torch.ops.pykernels.int8_mm is not there: pykernels_cpu.so is not in")
    assert "pip install" in last


def test_libraries_of_another_cpython_run(tmp_path: pathlib.Path) -> None:
    """`_host` is made for one CPython, the ops library for all."""
    site = python_files(tmp_path)
    shutil.copy(library(), site / "pykernels")
    done = python(SHOW_ISA, site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ISAS


def test_doctor_without_the_library_says_so(tmp_path: pathlib.Path) -> None:
    site = python_files(tmp_path)
    done = python("from pykernels.cli.main import app; app(['doctor'])", site, COLUMNS="200")
    assert done.returncode == 1
    assert "pykernels_cpu.so is not in" in done.stdout, done.stderr


def test_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert _load.load("pykernels_cpu") == (
        "pykernels needs torch 2.10 or newer, this is torch 2.9.1+cu128: pip install 'torch>=2.10'"
    )


def test_broken_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    broken = tmp_path / "pykernels_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_load, "library_path", lambda name: broken)
    reason = _load.load("pykernels_cpu")
    assert reason is not None
    assert str(broken) in reason
    assert torch.__version__ in reason


# ---- the wheel -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("needs the extra `build`")
    target = tmp_path_factory.mktemp("wheel")
    own = pathlib.Path(sys.prefix) / "build"  # made by `make build`: nothing is compiled again
    folder = own if (own / "CMakeFiles").is_dir() else target / "build"
    options = ["--no-build-isolation", "--no-deps", f"--config-settings=build-dir={folder}", "-w", str(target)]
    environment = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    output(sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(ROOT), env=environment)
    (found,) = target.glob("*.whl")
    return found


@pytest.mark.xdist_group("wheel")  # builds once
def test_wheel_holds_the_libraries_and_the_package_and_nothing_else(wheel: pathlib.Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "pykernels/pykernels_cpu.so" in names
    assert any(re.match(r"pykernels/_host\..*\.so$", name) for name in names)
    assert {"pykernels/__init__.py", "pykernels/py.typed", "pykernels/cli/main.py"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"pykernels", f"pykernels-{pykernels.__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o")) or "__pycache__" in name]


@pytest.mark.xdist_group("wheel")
def test_wheel_runs_without_a_compiler(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import torch, pykernels; print(pykernels.__file__); print(torch.ops.pykernels._isa())"
    done = python(code, tmp_path, PATH="")
    assert done.returncode == 0, done.stderr
    file, isa = done.stdout.split()
    assert pathlib.Path(file).is_relative_to(tmp_path)
    assert isa in ISAS


# ---- numbers that stand in two places --------------------------------------------------------------------------------
def test_version_and_torch_pin_agree_wherever_they_stand() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    assert f'\nversion = "{pykernels.__version__}"\n' in project
    (pin,) = re.findall(r"^torch==\S+$", constraints, re.MULTILINE)
    assert f'"{pin}"' in project
    floor = ".".join(map(str, _load.TORCH_FLOOR))
    assert f'"torch>={floor}"' in project
    major, minor = _load.TORCH_FLOOR
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}" in (ROOT / "CMakeLists.txt").read_text()
