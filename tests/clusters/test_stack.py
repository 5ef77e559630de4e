"""`nlray stack` with a tokenizer: how texts end and begin is asked at once, said, and kept by training and attempt."""

import json

import pytest
import tokenizers

from nlray.checkpoint import read_manifest
from nlray.clusters.cli import main
from nlray.clusters.generate import stream_text
from nlray.config.loading import load_config
from nlray.evals import generate as sampling
from tests.nlray.decoder_folders import save_source


@pytest.fixture
def source(tmp_path):
    """A llama and its tokenizer, which puts <s> before a text and ends it with <stop>."""
    folder = tmp_path / "source"
    save_source(folder, "llama")
    names = ["<s>", "<stop>", "[UNK]", "<other>", "a", "b"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<s>", "<stop>", "[UNK]"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("eos_token_id", None)
        (folder / name).write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    return folder


def test_the_end_token_is_found_said_and_written(source, tmp_path, capsys):
    assert main(["stack", str(source), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "a document ends with <stop> (data.end_token)" in out
    assert "nothing is put before a document or a prompt, but the tokenizer's own default is <s>" in out and "data.begin_token='<s>'" in out
    data = load_config(None, [f"init={tmp_path}/out"]).data
    assert (data.tokenizer, data.end_token, data.begin_token) == (f"{tmp_path}/out/tokenizer.json", "<stop>", None)


def test_the_begin_token_is_said_and_put_before_a_prompt(source, tmp_path, capsys, monkeypatch):
    arguments = ["stack", str(source), "--out", str(tmp_path / "out"), "data.begin_token=<s>", "data.end_token=<other>"]
    assert main(arguments) == 0
    assert "a document and a prompt begin with <s> (data.begin_token)" in capsys.readouterr().out
    prompts = []

    def answer(model, prompt, **options):
        prompts.append(list(prompt))
        return iter([4, 3, 5])

    monkeypatch.setattr(sampling, "generate", answer)
    options = {"tokens": 3, "temperature": 1.0, "top_k": None, "seed": 0}
    texts = ["".join(stream_text(str(tmp_path / "out"), prompt, **options)) for prompt in ("a b", "<other>", "")]
    assert prompts == [[0, 4, 5], [0, 2, 2], [0]]
    # Attempt ends with the end token.
    assert texts[0].replace(" ", "") == "aba" and texts[2].strip() == "a"


def test_a_tokenizer_without_an_end_is_asked_for_it_and_nothing_is_written(source, tmp_path, capsys):
    (source / "tokenizer_config.json").unlink()
    assert main(["stack", str(source), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len([line for line in err if line.startswith("nlray: error:")]) == 1 and "data.end_token is null" in err[-1]
    assert not (tmp_path / "out").exists()
    assert main(["stack", str(source), "--out", str(tmp_path / "out"), "data.end_token='[UNK]'"]) == 2
    assert "no character of a text is made into" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(source, tmp_path, capsys):
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_tokens([f"more{i}" for i in range(80)])
    tokenizer.save(str(source / "tokenizer.json"))
    assert main(["stack", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "model.vocab_size is 61; allowed: 86" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_the_command_line_is_the_one_that_is_copied(source, tmp_path, capsys, monkeypatch):
    (source / "tokenizer.json").rename(tmp_path / "mine.json")
    assert main(["stack", str(source), "--out", str(tmp_path / "bytes")]) == 0
    assert "data.tokenizer is bytes: the source has no tokenizer.json" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert main(["stack", str(source), "--out", "out", "data.tokenizer=mine.json", "data.end_token=<stop>"]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "mine.json").read_bytes()
    assert load_config(None, ["init=out"]).data.tokenizer == f"{tmp_path}/out/tokenizer.json"
    assert read_manifest(str(tmp_path / "out" / "checkpoints" / "step_000000000")).step == 0


def test_files_that_are_left_out_are_said(source, tmp_path, capsys):
    (source / "model_ema.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert main(["stack", str(source), "--out", str(tmp_path / "out")]) == 0
    assert "left out model_ema.safetensors: no part of the model" in capsys.readouterr().out
