"""`nlray generate`: from a checkpoint to text, the same for the same seed, whole characters only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlray.checkpoint import checkpoint_dir, write_manifest, write_part
from nlray.clusters.cli import main
from nlray.clusters.generate import decode_pieces
from nlray.config.loading import config_to_yaml, load_config
from nlray.models.lm import build_model
from nlray.pipelines.tokenizers import ByteTokenizer

SMALL = ["model.dim=16", "model.layers=1", "model.heads=2", "model.seq_len=32", "model.titans.chunk_size=8"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with one checkpoint of an untrained model whose parameters lie in two files."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config("tiny", SMALL)
    (folder / "config.yaml").write_text(config_to_yaml(config))
    parameters = {f"param/{name}": p for name, p in build_model(config, 257, seed=1).named_parameters()}
    url = checkpoint_dir(str(folder), 3)
    names = list(parameters)
    parts = [write_part(url, f"{i}.safetensors", {n: parameters[n] for n in names[i::2]}) for i in range(2)]
    write_manifest(url, 3, parts, {})
    return folder


def test_run_and_checkpoint_give_the_same_text(run_dir, capsys):
    for path in (run_dir, run_dir / "checkpoints" / "step_000000003"):
        assert main(["generate", str(path), "Grüße", "--tokens", "12"]) == 0
    first, second = capsys.readouterr().out.split("Grüße")[1:]
    assert first == second and len(first) > 1


def test_a_checkpoints_own_folder_may_be_the_current_one(run_dir, capsys, monkeypatch):
    monkeypatch.chdir(run_dir / "checkpoints" / "step_000000003")
    assert main(["generate", ".", "ab", "--tokens", "3"]) == 0
    monkeypatch.chdir(run_dir / "checkpoints")
    assert main(["generate", "step_000000003/", "ab", "--tokens", "3"]) == 0
    first, second = capsys.readouterr().out.split("ab")[1:]
    assert first == second


def test_resume_takes_a_step_or_a_checkpoints_own_folder(run_dir, capsys):
    """Up to the checks before anything is started: this checkpoint has parameters only."""
    run, own = str(run_dir), str(run_dir / "checkpoints" / "step_000000003")
    for arguments, message in {
        (run, "--step", "7"): f"{run}: no checkpoint of step 7; there are: 3",
        (run, "--step", "3"): "step_000000003: holds no state of a run",
        (f"{own}/",): "step_000000003: holds no state of a run",
        (own, "--step", "3"): "step_000000003: holds no state of a run",
        (own, "--step", "7"): "--step 7: ",
        (run, "--step", "-1"): "--step",
    }.items():
        assert main(["resume", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_seed_and_temperature_matter(run_dir, capsys):
    texts = []
    for options in (["--seed", "1"], ["--seed", "2"], ["--temperature", "0", "--seed", "1"], ["--top-k", "1", "--seed", "2"]):
        assert main(["generate", str(run_dir), "ab", "--tokens", "12", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    assert texts[2] == texts[3]


def test_empty_prompt_is_a_mistake(run_dir, capsys):
    assert main(["generate", str(run_dir), ""]) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_corrupted_checkpoint_is_named(run_dir, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    folder = tmp_path / "checkpoints" / "step_000000003"
    folder.mkdir(parents=True)
    for file in (run_dir / "checkpoints" / "step_000000003").iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "1.safetensors":
            data[-1] ^= 1
        (folder / file.name).write_bytes(data)
    assert main(["generate", str(tmp_path), "x"]) == 2
    assert "1.safetensors" in capsys.readouterr().err


@given(st.text(), st.text(min_size=1))
def test_pieces_are_whole_characters_and_add_up(text, prompt):
    tokenizer = ByteTokenizer()
    prompt, text = (s.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for s in (prompt, text))
    pieces = list(decode_pieces(tokenizer, tokenizer.encode(prompt).tolist(), iter(tokenizer.encode(text).tolist())))
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_pieces_come_as_soon_as_a_character_is_whole():
    tokenizer = ByteTokenizer()
    seen = []

    def tokens():
        for token in tokenizer.encode("aé!").tolist():
            yield token
            seen.append(len(pieces))

    pieces = []
    for piece in decode_pieces(tokenizer, [120], tokens()):
        pieces.append(piece)
    assert [p for p in pieces if p] == ["a", "é", "!"] and seen == [1, 1, 2, 3]
