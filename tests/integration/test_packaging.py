"""Packaging: declared requirements equal imports; the wheel, its command, environments that lack single packages."""

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.bare_environments import build_wheel, declared, install, make_environment, site_packages

import dreamdance
from dreamdance.launch.job import ENTRIES
from dreamdance.launch.requirements import EXTRAS
from dreamdance.launch.run_folder import create_or_check
from dreamdance.recipe import load_recipe

ROOT = Path(__file__).parents[2]
OPTIONAL = {"cv2": "opencv-python-headless", "av": "av", "deepspeed": "deepspeed", "streaming": "mosaicml-streaming"}
OPTIONAL |= {"tensorboard": "tensorboard"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}


def declared_by_setup() -> dict[str, list[str]]:
    """Extra -> requirements; those of every installation under an empty name."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {extra: text.split("\n")[1:] for extra, text in lists.items()}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def source(module: str) -> Path | None:
    """The file of one of our modules; None for modules of other projects."""
    root = ROOT / "kernels" if module.startswith("dreamdance_kernels") else ROOT
    path = root / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports(tree: ast.AST, *, at_once: bool = False) -> Iterator[str]:
    """Modules that a source imports; `at_once`: only those that its own import loads, not what functions import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, at_once=at_once)


def reached(*modules: str) -> set[Path]:
    """Our files that an import of these modules loads, including the packages that contain them."""
    files: set[Path] = set()
    left = list(modules)
    while left:
        module = left.pop()
        left += [module.rpartition(".")[0]] if "." in module else []
        file = source(module)
        if file is not None and file not in files:
            files.add(file)
            left += imports(ast.parse(file.read_text(encoding="utf-8")), at_once=True)
    return files


def distributions(files: set[Path], *, at_once: bool = False) -> dict[str, Path]:
    """Distributions that files import from -> one of those files."""
    known = metadata.packages_distributions()
    found: dict[str, Path] = {}
    for file in files:
        for module in imports(ast.parse(file.read_text(encoding="utf-8")), at_once=at_once):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in ("dreamdance", "dreamdance_kernels"):
                found |= {canonicalize_name(name): file for name in known.get(top, [top])}
    return found


def test_every_import_is_declared() -> None:
    library = {*(ROOT / "dreamdance").rglob("*.py"), *(ROOT / "kernels" / "dreamdance_kernels").rglob("*.py")}
    extras = declared_by_setup()
    dev = extras.pop("dev")
    of_the_library = {name for requirements in extras.values() for name in names(requirements)}
    assert distributions(library).keys() - of_the_library == set()
    others = {file for folder in ("tests", "tools", "launchers", "kernels") for file in (ROOT / folder).rglob("*.py")}
    beside_tests = {"support"}
    for folder in (ROOT / "kernels" / "benchmarks", ROOT / "tools"):
        beside_tests |= {file.stem for file in folder.glob("*.py")}
    beside_tests = {canonicalize_name(name) for name in beside_tests}
    assert distributions(others).keys() - of_the_library - names(dev) - beside_tests == set()


@pytest.mark.slow
def test_every_declared_package_is_imported() -> None:
    files = {file for folder in ("dreamdance", "kernels", "tests") for file in (ROOT / folder).rglob("*.py")}
    tools = {"pytest-timeout", "pytest-xdist", "ruff", "mypy", "import-linter", "types-pyyaml"}
    unused = {name for requirements in declared_by_setup().values() for name in names(requirements)}
    assert unused - distributions(files).keys() - tools == {
        "accelerate"
    }  # diffusers needs it to load networks without extra memory


@pytest.mark.parametrize("module", ["dreamdance.console", "dreamdance.pipelines", "dreamdance.training.planning.plan"])
def test_an_installation_without_extras_can_import(module: str) -> None:
    loaded = distributions(reached(module), at_once=True)
    assert loaded.keys() - names(declared_by_setup()[""]) == set(), loaded


@pytest.mark.parametrize("task", ENTRIES)
def test_the_extras_that_a_task_asks_for_install_all_that_it_imports(task: str) -> None:
    extras = declared_by_setup()
    installed = {name for extra in {"", *EXTRAS.get(task, {}).values()} for name in names(extras[extra])}
    loaded = distributions(reached(ENTRIES[task].partition(":")[0]), at_once=True)
    assert loaded.keys() - installed == set(), loaded
    for package, extra in EXTRAS.get(task, {}).items():
        assert OPTIONAL[package] in names(extras[extra])


def test_the_package_and_setup_cfg_state_the_same_version() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == dreamdance.__version__


def test_the_pins_satisfy_every_bound() -> None:
    lines = (ROOT / "tools" / "pins.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    for extra, requirements in declared_by_setup().items():
        for requirement in map(Requirement, requirements):
            if extra != "flash":  # built by users with the tools for a GPU
                assert versions[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment into which the wheel was installed without extras."""
    python = make_environment(tmp_path_factory.mktemp("base") / "venv", declared(declared_by_setup()[""]))
    install(python, wheel)
    return python


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    roots = {ROOT: "dreamdance", ROOT / "kernels": "dreamdance_kernels"}
    sources = {file.relative_to(root) for root, name in roots.items() for file in (root / name).rglob("*.py")}
    assert {file for file in files if ".dist-info/" not in file} == {
        *(path.as_posix() for path in sources),
        "dreamdance/data/curation/page.html",
        "dreamdance/evaluation/report.html",
        "dreamdance/py.typed",
        "dreamdance_kernels/py.typed",
        "dreamdance_kernels/dispatch_table.csv",
    }


@pytest.mark.slow
def test_an_installation_without_extras_has_pipelines_attention_and_plans(base: Path, tmp_path: Path) -> None:
    program = f"""
import importlib.util, sys, torch, dreamdance.pipelines
from dreamdance.console import main
from dreamdance_kernels import available_backends, geometry_attention
absent = [name for name in ("cv2", "av", "deepspeed", "streaming", "tensorboard") if importlib.util.find_spec(name)]
assert absent == [], absent
assert "site-packages" in dreamdance.__file__
query = torch.ones(3, 4, 16)
assert torch.equal(geometry_attention(query, query, query, num_domains=3, num_heads=2), query)
if importlib.util.find_spec("triton") is None:
    assert available_backends()["triton"] == "the package triton is not installed"
sys.argv = ["dreamdance", "{ROOT}/recipes/demo/stage2.yaml", "--dry-run", "model.unet.path={ROOT}/recipes/base/video"]
sys.exit(main())
"""
    done = run(base, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memory per process" in done.stdout  # the plan, made by the networks themselves
    assert "dreamdance.launch.rank" in done.stdout  # the batch script
    assert "pip install 'dreamdance[train]'" in done.stdout  # the warnings


def test_an_installation_without_extras_has_the_command(base: Path, tmp_path: Path) -> None:
    command = base.parent / "dreamdance"
    helped = run(command, "--help", cwd=tmp_path)
    assert helped.returncode == 0
    assert helped.stdout.startswith("usage: dreamdance RECIPE [key=value ...]")
    assert run(command, "status", cwd=tmp_path).returncode == 0
    assert run(command, ROOT / "recipes/demo/animate.yaml", "--dry-run", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("task", ["prepare", "stage1_domains", "animate", "evaluate"])
def test_a_task_names_the_extras_that_it_misses_and_is_not_started(base: Path, tmp_path: Path, task: str) -> None:
    done = run(base.parent / "dreamdance", ROOT / f"recipes/demo/{task}.yaml", "--cluster=local", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for package, extra in EXTRAS[task.partition("_")[0]].items():
        assert f"Python package {package}\n" in done.stderr
        assert f"pip install 'dreamdance[{extra}]'" in done.stderr
    assert not list(tmp_path.glob("runs/*"))


def test_a_job_on_a_machine_that_lacks_a_package_names_the_extra(base: Path, tmp_path: Path) -> None:
    create_or_check(load_recipe(ROOT / "recipes/demo/prepare.yaml"), tmp_path, [])
    done = run(base, "-P", "-m", "dreamdance.launch.rank", tmp_path / "logs", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "lacks streaming, av, cv2: pip install 'dreamdance[train,video]'" in done.stdout


@pytest.mark.parametrize("package", OPTIONAL)
def test_each_package_alone_is_missed_by_the_tasks_that_need_it_and_by_no_other(
    wheel: Path, tmp_path: Path, package: str
) -> None:
    """The launcher finds it without importing torch."""
    wanted = {name for requirements in declared_by_setup().values() for name in names(requirements)}
    left_out = {OPTIONAL[package], "torch", "flash-attn"}
    python = make_environment(tmp_path / "venv", declared(sorted(wanted - left_out)) - left_out)
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site_packages(python))
    program = f"""
from dreamdance.launch.requirements import missing_packages
from dreamdance.recipe import load_recipe
for task in ("prepare", "encode", "stage1_domains", "stage2", "animate", "evaluate"):
    print(task, *missing_packages(load_recipe(f"{ROOT}/recipes/demo/{{task}}.yaml")))
"""
    done = run(python, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    missed = {words[0].partition("_")[0]: words[1:] for words in map(str.split, done.stdout.splitlines())}
    assert missed == {task: [package] if package in extras else [] for task, extras in EXTRAS.items()}


@pytest.fixture(scope="module")
def prepared(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an installation with the extras that `prepare` asks for."""
    extras = declared_by_setup()
    wanted = [*extras[""], *extras["train"], *extras["video"]]
    python = make_environment(tmp_path_factory.mktemp("prepared") / "venv", declared(wanted))
    install(python, wheel)
    return python


@pytest.mark.slow
def test_a_job_runs_from_any_folder_with_a_safe_path_and_both_commands_know_it(prepared: Path, tmp_path: Path) -> None:
    words = [ROOT / "recipes/demo/prepare.yaml", "--cluster=local", "--follow", "cluster.tasks_per_node=1"]
    words += ["dancers.num_train_clips=1", "dancers.num_validation_clips=1"]
    done = run(prepared, ROOT / "launchers/slurm.py", *words, cwd=tmp_path, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "data/demo/train/index.json").is_file()
    again = run(prepared.parent / "dreamdance", *words, cwd=tmp_path, PYTHONSAFEPATH="1")
    assert again.returncode == 0
    assert "is finished" in again.stdout


@pytest.mark.parametrize("launcher", ["dreamdance", "launchers/slurm.py"])
def test_both_commands_have_the_same_exit_codes_and_name_themselves_in_advice(
    base: Path, tmp_path: Path, launcher: str
) -> None:
    words = [base.parent / "dreamdance"] if launcher == "dreamdance" else [base, ROOT / launcher]
    name = "dreamdance" if launcher == "dreamdance" else "python launchers/slurm.py"
    assert run(*words, "status", cwd=tmp_path, PYTHONSAFEPATH="1").returncode == 0
    bad = run(*words, "cancel", cwd=tmp_path)
    assert bad.returncode == 2
    assert f"usage: {name} RECIPE" in bad.stderr


def test_the_script_of_a_checkout_without_the_project_names_the_install_command(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv", [])
    done = run(python, ROOT / "launchers/slurm.py", "status", cwd=tmp_path)
    assert done.returncode == 2
    assert "run tools/setup.sh" in done.stderr
