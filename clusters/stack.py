"""`nlray stack`: take a pretrained decoder over, say what was taken, and how its texts begin and end."""

from dataclasses import replace

from nlray.clusters.progress import describe_levels, format_count
from nlray.config import Config
from nlray.errors import UserError
from nlray.pipelines.tokenizers import HFTokenizer, checked_vocab_size, load_tokenizer
from nlray.run_plan import RunPlan
from nlray.stacking.decoders import open_source
from nlray.stacking.stack import check_free, stacked_config, write_stacked
from nlray.storage import absolute


def stack_model(source: str, out: str, overrides: list[str], *, trust: bool = False) -> None:
    """Write the decoder at `source` to the new folder `out`, and print what it is.

    Raises:
        UserError: it cannot be taken over, or its tokenizer does not say how a text ends. Nothing is written then.
    """
    source, target = absolute(source), absolute(out)
    decoder = open_source(source, trust=trust)
    check_free(target)
    config = stacked_config(decoder, source, overrides)
    config, notes = _with_end_token(config, has_tokenizer="tokenizer" in decoder.data)
    config = write_stacked(decoder, config, source, target)
    size = RunPlan.build(config).num_parameters
    print(f"model    {config.model.layers} layers, dim {config.model.dim}, {format_count(size)} parameters, {config.cms.layout}")
    print(describe_levels(config))
    print("\n".join(f"note     {note}" for note in (*notes, *decoder.notes)))
    print(f"written  {out}; go on with  nlray train init={out} 'data.sources=[...]'")


def _with_end_token(config: Config, *, has_tokenizer: bool) -> tuple[Config, list[str]]:
    """Return the configuration with `data.end_token` written out, and lines that say how a text begins and ends."""
    tokenizer = load_tokenizer(config.data)
    if not isinstance(tokenizer, HFTokenizer):
        why = ": the source has no tokenizer.json; where it lies elsewhere, stack with data.tokenizer=FILE.json"
        return config, [f"data.tokenizer is bytes{'' if has_tokenizer else why}"]
    try:
        checked_vocab_size(config, tokenizer)
    except UserError as error:
        raise UserError(f"{error}; the model's own tokenizer is needed") from error
    lines = [f"{config.data.tokenizer}: a document ends with {tokenizer.end_token} (data.end_token)"]
    begin, usual = tokenizer.begin_token, tokenizer.usual_begin
    if begin is not None:
        lines.append(f"a document and a prompt begin with {begin} (data.begin_token)")
    elif usual is None:
        lines.append("nothing is put before a document or a prompt (data.begin_token)")
    else:
        advice = f'if the model was trained with it, stack with "data.begin_token={usual!r}"'
        lines.append(f"nothing is put before a document or a prompt, but the tokenizer's own default is {usual}: {advice}")
    return replace(config, data=replace(config.data, end_token=tokenizer.end_token)), lines
