"""A first run from Python: train, look, scale, stop, load. Run it as a script, or cell by cell in an editor that knows `# %%`."""

# %% The configuration: a preset, with sections overridden. `nlray config tiny` prints all keys.
import tempfile
from pathlib import Path

import nlray

folder = Path(tempfile.mkdtemp())
text = folder / "text.txt"
text.write_text("The quick brown fox jumps over the lazy dog, and the lazy dog does not mind. " * 4000)

config = nlray.load_config(
    "tiny",
    run={"name": "first", "dir": str(folder / "run"), "steps": 40},
    data={"sources": [str(text)]},
    model={"dim": 32, "layers": 2, "heads": 2, "seq_len": 64},
    eval={"every": 20, "sequences": 8},
    recovery={"window": 8},
)

# %% Start it. Ray starts in this process; wait=False returns at once.
run = nlray.train(config, wait=False)
print(run.status().state)

# %% A level gets a second rank while the run continues, at the next recovery point: every 8 steps here, 64 by default.
run.scale(slow=2)

# %% Wait for the end. Ctrl-C here stops the run with a checkpoint.
end = run.wait()
print(end.summary["status"], end.summary["loss_last"])
run.close()

# %% The rows of metrics.jsonl as a pyarrow table.
metrics = run.metrics()
print(metrics.column_names)
print(metrics["loss"].to_pylist()[::10])

# %% The trained model and its tokenizer, in plain torch.
model, tokenizer = run.load_model()
tokens = tokenizer.encode("The quick brown")
print(sum(p.numel() for p in model.parameters()), tokens.tolist())

# %% The same from the folder, in any other process.
model, tokenizer = nlray.load(run.dir)
print(nlray.attach(run.dir).status().summary["digest"])
