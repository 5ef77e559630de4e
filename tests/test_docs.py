"""The documents describe today's code: the paths, functions, commands and configuration keys that they name exist."""

import ast
import inspect
import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from nlray.clusters.cli import app, split_arguments
from nlray.config import OPTIMIZERS, ModelConfig
from nlray.config.docs import find
from nlray.config.loading import PRESETS, load_config, parse_config
from nlray.errors import UserError
from nlray.memories.delta.reference import memory_reference
from nlray.memories.family import memory_of
from nlray.memories.scan import GATE_COMPONENTS, MemoryWeights, input_width
from nlray.models.lm import build_model, level_parameters, sequence_parameters
from nlray.optimizers import DeltaGradientDescent, OuterOptimizer
from nlray.optimizers.registry import CLASSES
from nlray.run_plan import RunPlan

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
PATH = re.compile(
    r"(?:nlray|pipelines|actors|clusters|tests|docs|benchmarks|examples|experiments)/[\w./-]*|Makefile|pyproject\.toml|constraints\.txt"
)
KEY = re.compile(r"(?:run|data|model|optimizer|cms|sequence|exchange|recovery|eval)(?:\.\w+)+")


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def quoted(document: str) -> list[str]:
    """Return what stands in backticks outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text_of(document), flags=re.M | re.S))


def code_blocks(document: str, language: str, section: str = "") -> list[str]:
    """Return the code blocks of a language, of one section or of the whole document."""
    text = text_of(document).partition(f"\n## {section}\n")[2].partition("\n## ")[0] if section else text_of(document)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


@cache
def names_in(file: Path) -> frozenset[str]:
    """Return the functions, classes and variables of a module, those of a class as CLASS.NAME."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")

    collect(ast.parse(file.read_text()).body, "")
    return frozenset(names)


def missing_names(reference: str) -> list[str]:
    """Return which names of `path.py: name, name` the file does not define."""
    path, _, names = reference.partition(": ")
    return [name for name in names.split(", ") if name not in names_in(ROOT / path)]


def links_of(document: str) -> list[str]:
    """Return what the links of a document lead to, outside of code."""
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text_of(document), flags=re.M | re.S))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors_of(document: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(document), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    for link in links_of(document):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / document).parent / path if path else ROOT / document
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target.relative_to(ROOT).as_posix()), link
            assert document in ("README.md", "CONTRIBUTING.md") or target.parent == ROOT / "docs", f"{link}: not a page of the site"


def test_every_page_is_in_the_navigation_of_the_site():
    pages = re.findall(r"^ *- [^:\n]+: (\S+\.md)$", text_of("mkdocs.yml"), flags=re.M)
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@cache
def texts_of_the_code() -> str:
    """Return every string of the product, a line each; a blank stands for what an f-string fills in."""
    texts = []
    for folder in ("nlray", "pipelines", "actors", "clusters"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text())
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if id(node) in docstrings:
                    continue
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                if any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts):
                    texts.append(" ".join(str(part.value) if isinstance(part, ast.Constant) else " " for part in parts))
    return "\n".join(" ".join(text.split()) for text in texts)


def fragments_of(message: str) -> list[str]:
    """Return the fixed parts of a message in the documents, in which `...` and words in capitals stand for what the code fills in."""
    parts = re.split(r"\.\.\.|\b[A-Z][A-Z_]*\b", message)
    return [part for part in (part.strip(" :;,()'") for part in parts) if len(part) > 3]


SYMPTOMS = [
    message
    for section in ("Before the start", "During the run", "Data")
    for row in text_of("docs/troubleshooting.md").partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    if row.startswith("| `")
    for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])
]


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    missing = {message: [part for part in fragments_of(message) if part not in texts_of_the_code()] for message in SYMPTOMS}
    assert len(SYMPTOMS) >= 20 and {message: parts for message, parts in missing.items() if parts} == {}
    assert fragments_of("run NAME: is no message of ...") == ["is no message of"] and "is no message of" not in texts_of_the_code()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document):
    paths = [found.group() for text in quoted(document) if (found := PATH.fullmatch(text.partition(": ")[0]))]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", ["docs/architecture.md", "docs/paper_map.md"])
def test_every_named_function_exists(document):
    references = [text for text in quoted(document) if ".py: " in text and text != "file.py: name"]
    assert len(references) > 20 and {text: missing for text in references if (missing := missing_names(text))} == {}


def test_a_name_that_is_not_there_is_found():
    text = "nlray/levels/plan.py: deal_tensors, LevelPlan.shards, LevelPlan.nothing, shards"
    assert missing_names(text) == ["LevelPlan.nothing", "shards"]


def test_every_departure_in_the_code_is_in_the_paper_map():
    rows = [line for line in text_of("docs/paper_map.md").partition("\n## Departures")[2].splitlines() if line.startswith("| Eq.")]
    found = 0
    for folder in ("nlray", "pipelines", "actors", "clusters"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for equation in re.findall(r"Departs from (Eq\. \d+(?:[,-] ?\d+)*)", file.read_text()):
                found += 1
                path = file.relative_to(ROOT).as_posix()
                assert any(row.startswith(f"| {equation} |") and f"`{path}: " in row for row in rows), f"{path}: {equation}"
    assert found > 0


def key_exists(key: str) -> bool:
    """Return whether the configuration has a dotted key; any name may stand for a level."""
    try:
        find(key)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_quoted_key_exists(document):
    keys = [found.group() for text in quoted(document) if (found := KEY.fullmatch(text.partition("=")[0]))]
    assert [key for key in keys if not key_exists(key)] == []
    assert key_exists("cms.levels.any.resources.gpus") and not key_exists("cms.levels.any.gpus") and not key_exists("run.step")


LINES = [(document, line) for document in DOCUMENTS for block in code_blocks(document, "sh") for line in block.splitlines() if line]
ELSEWHERE = ("ray start", ". .venv/bin/activate", ".venv/bin/pip install", "tensorboard ", "docker run", "pip install")
"""What a machine for tests does not run: other programs, and what needs a network."""


@pytest.mark.parametrize(("document", "line"), LINES)
def test_every_command_exists_and_its_configuration_loads(document, line):
    words = shlex.split(line, comments=True)
    if not words or line.startswith(ELSEWHERE):
        return
    if words[0] == "nlray":
        check_nlray(words[1:])
    elif words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= set(re.findall(r"^([\w-]+):", text_of("Makefile"), flags=re.M)), line
    else:
        assert words[0] == "python", line
        module = words[words.index("-m") + 1] if "-m" in words else words[1].removesuffix(".py").replace("/", ".")
        path = module.replace(".", "/")
        assert (ROOT / f"{path}.py").exists() or (ROOT / path / "__main__.py").exists(), line


def check_nlray(words: list[str]) -> None:
    """Check that a command and its options exist, and that its `key=value` arguments are a configuration."""
    command = typer.main.get_command(app).commands[words[0]]
    overrides = [word for word in words[1:] if re.match(r"(init|[a-z]+\.[\w.]+)=", word)]
    options = {option for parameter in command.params for option in parameter.opts}
    assert [word for word in words[1:] if word.startswith("--") and word not in options] == [], words
    source = None
    if words[0] in ("train", "levels", "config"):
        end = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        source, given = split_arguments(words[1:end])
        assert given == overrides and (source is None or source in PRESETS or source == "my.yaml"), words
    # The folder that `init` names is not there, and a class of one's own is in the section that shows it.
    known = [
        o for o in overrides if not o.startswith("init=") and not re.search(r"=\w+:\w+$|memory_options|titans\.options|mlp_options", o)
    ]
    load_config(source if source in PRESETS else "tiny", known)


NEEDS = re.compile(r"--address|resources\.gpus=[1-9]|transport=nixl|--peers")
"""What a command has that this machine may lack: a cluster, GPUs, NIXL, a network."""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_command_that_needs_more_than_this_machine_is_marked(document):
    for block in code_blocks(document, "sh"):
        lines = ["", *block.splitlines()]
        for before, line in pairwise(lines):
            if NEEDS.search(line.partition(" # ")[0]):
                assert "needs " in line.partition(" # ")[2] or before.startswith("# needs "), f"{line}: say what it needs"


def test_the_documents_show_every_command():
    shown = {line.split()[1] for _, line in LINES if line.startswith("nlray ")}
    assert shown == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("document", ["README.md", "docs/quickstart.md"])
def test_the_example_file_loads(document):
    (example,) = code_blocks(document, "yaml")
    config = parse_config(document, example)
    assert [source.path for source in config.data.sources] == ["a.parquet", "b/"]
    assert list(config.levels) == ["fast", "slow"] and config.levels["slow"].ranks == 2


def extension(monkeypatch: pytest.MonkeyPatch, section: str, file: str) -> list[list[str]]:
    """Make the file that a section of the extending page quotes importable, and return the words of the section's commands."""
    (example,) = code_blocks("docs/extending.md", "python", section)
    assert example == text_of(f"examples/{file}"), f"docs/extending.md does not show examples/{file} as it is"
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    commands = [shlex.split(line)[1:] for line in "".join(code_blocks("docs/extending.md", "sh", section)).splitlines()]
    assert [words[:2] for words in commands] == [["levels", "tiny"], ["train", "tiny"]]
    return commands


def test_the_level_of_the_extending_page_trains_is_listed_and_learns_in_context(monkeypatch):
    commands = extension(monkeypatch, "A level of your own", "lowrank.py")
    for words, in_context, rank in zip(commands, (False, True), (16, 8), strict=True):
        config = load_config("tiny", [*words[2:], "model.dim=16", "model.layers=2", "cms.hidden=24", "model.seq_len=80"])
        names = {problem.name: problem for problem in RunPlan.build(config, 31).nested_system.problems}
        model = build_model(config, 31, seed=0)
        assert sum(p.parameters for p in names.values()) == sum(p.numel() for p in model.parameters())
        assert names["cms.slow"].parameters == 2 * (16 + 24 * 16 + rank * 24 + 16 * rank)
        assert ("cms.fast.in_context" in names) == in_context
        levels = level_parameters(model)
        optimizer = OuterOptimizer(levels["fast"], config.levels["fast"].optimizer, horizon=10)
        blocks = torch.randint(31, (2, 81), generator=torch.Generator().manual_seed(0))
        before = model.token_losses(blocks)[0].mean()
        before.backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step(16)
        with torch.no_grad():
            losses, state = model.token_losses(blocks)
            assert losses.mean() < before
            changes = [change for block in state for level in block.levels for change in level.changes]
            assert len(changes) == (6 if in_context else 0) and all(change.abs().max() > 0 for change in changes)
            model.set_inner_lr(0.0)
            assert not torch.equal(model.token_losses(blocks)[0], losses)


def test_the_optimizer_of_the_extending_page_trains_and_is_listed(monkeypatch):
    commands = extension(monkeypatch, "An optimizer of your own", "lion.py")
    for words in commands:
        config = load_config("tiny", [*words[2:], "cms.defaults.optimizer.schedule.kind=constant"])
        names = {problem.name: problem for problem in RunPlan.build(config, 31).nested_system.problems}
        assert names["cms.slow.momentum"].state_values == names["cms.slow"].parameters
        level = config.levels["slow"].optimizer
        assert level.name == "lion:Lion" and level.lr == 1e-3 and level.options in ({}, {"beta1": 0.95})
        beta1 = level.options.get("beta1", 0.9)
        parameters = {"w_in": torch.zeros(2, 2), "norm": torch.zeros(2)}
        optimizer = OuterOptimizer(parameters, level, horizon=10)
        first, second = torch.tensor([1.0, -2.0]), torch.tensor([-0.5 * beta1 / (1 - beta1) * 0.01, -1.0])
        for step, gradient in ((17, first), (18, second)):
            for parameter in parameters.values():
                parameter.grad = gradient.expand_as(parameter).clone()
            optimizer.step(step)
        # The second answer is the sign of beta1 m + (1 - beta1) g, with m = 0.01 of the first gradient.
        answer = (beta1 * 0.01 * first + (1 - beta1) * second).sign()
        assert torch.allclose(parameters["norm"], -1e-3 * (first.sign() + answer)) and answer.tolist() == [1, -1] != second.sign().tolist()


def test_the_memory_of_the_extending_page_trains_streams_and_is_listed(monkeypatch):
    for words in extension(monkeypatch, "A memory of your own", "diagonal.py"):
        small = ["model.dim=16", "model.layers=1", "model.heads=2", "model.titans.chunk_size=4"]
        config = load_config("tiny", [*words[2:], *small])
        model = build_model(config, 31, seed=0)
        tensors = {name.rpartition(".")[2]: p for name, p in model.named_parameters() if ".memory.m_" in name}
        assert {name: tuple(p.shape) for name, p in tensors.items()} == {
            f"m_{component}": (2, 8) for component in config.model.titans.components
        }
        model_of_other_std = build_model(load_config("tiny", [*words[2:], *small, "model.titans.options={std: 3.0}"]), 31, seed=0)
        scaled = dict(model_of_other_std.named_parameters())["blocks.0.memory.m_k"] * (config.model.titans.options.get("std", 1.0) / 3)
        assert torch.allclose(tensors["m_k"], scaled) and tensors["m_k"].std() > 0.2 and not tensors["m_eta"].any()
        blocks = torch.randint(0, 31, (2, 14), generator=torch.Generator().manual_seed(0))
        whole, state = model.token_losses(blocks)
        first, between = model.token_losses(blocks[:, :7])
        rest, last = model.token_losses(blocks[:, 6:], between)
        assert torch.allclose(torch.cat([first, rest], dim=1), whole, atol=1e-5)
        assert (
            torch.allclose(last[0].mixer.fast_weights, state[0].mixer.fast_weights, atol=1e-6) and last[0].mixer.open_inputs.shape[2] == 1
        )
        whole.mean().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        OuterOptimizer(sequence_parameters(model), config.sequence.optimizer, horizon=1000).step(100)
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if ".memory.m_" in name)
        problems = {problem.name: problem for problem in RunPlan.build(config, 31).nested_system.problems}
        held = sum(p.state_values for name, p in problems.items() if name.startswith("memory."))
        assert held == state[0].mixer.fast_weights[0].numel() and "diagonal" in problems["memory.mem"].rule


@pytest.mark.parametrize(
    "settings",
    [
        {"phase": "static", "retain": "zero"},
        {"phase": "adaptive", "adapt_q": True, "chunk_sizes": {"k": 2, "eta": 1}},
        {"phase": "self_modifying", "objective": "l2", "read": "chunk_start", "chunk_sizes": {"mem": 8}},
    ],
    ids=lambda settings: settings["phase"],
)
def test_the_memory_of_the_extending_page_equals_the_recurrence(monkeypatch, settings):
    extension(monkeypatch, "A memory of your own", "diagonal.py")
    model = ModelConfig(dim=8, heads=2, titans={"chunk_size": 4, "memory": "diagonal:Diagonal", "rule": "gd", **settings})
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    weights = MemoryWeights(
        {component: (noise(2, 4),) for component in model.titans.components}, {gate: noise(2) for gate in model.titans.gates}
    )
    inputs, q = noise(2, 2, 15, input_width(model)), None if model.titans.adapt_q else noise(2, 2, 15, 4)
    memory = memory_of(model)
    y, _ = memory(inputs, q, weights, memory.initial_state(2, weights), inner_lr=0.7)

    def answer(component: str, layers: tuple[torch.Tensor, ...], z: torch.Tensor) -> torch.Tensor:
        made = layers[0].squeeze(-2) * z
        return made.sum(-1, keepdim=True) if component in GATE_COMPONENTS else made

    expected, _, _ = memory_reference(inputs, q, weights, model=model, inner_lr=0.7, answer=answer)
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-10)
    wanted = [inputs, *(layers[0] for layers in weights.memories.values()), *weights.biases.values()]
    gradients = (torch.autograd.grad(outputs.square().sum(), wanted) for outputs in (y, expected))
    assert all(torch.allclose(*pair, rtol=1e-10, atol=1e-10) for pair in zip(*gradients, strict=True))


def test_the_optimizers_of_the_page_are_those_of_the_configuration():
    rows = {
        name: row
        for row in text_of("docs/optimizers.md").splitlines()
        if (name := row.partition("`")[2].partition("`")[0]) and row.startswith("| `")
    }
    assert tuple(rows) == OPTIMIZERS
    for name, row in rows.items():
        arguments = set(inspect.signature(CLASSES[name].__init__).parameters)
        assert set(re.findall(r"`(\w+)`", row)) - {name} <= arguments, name
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    (example,) = code_blocks("docs/optimizers.md", "python")
    scope = {"model": model, "torch": torch}
    exec(example, scope)
    before = model[0].weight.detach().clone()
    model(torch.ones(5, 4)).square().mean().backward()
    scope["optimizer"].step()
    assert isinstance(scope["optimizer"], DeltaGradientDescent) and not torch.equal(model[0].weight, before)
