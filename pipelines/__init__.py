"""nlray.pipelines: from text on any fsspec URL to blocks of tokens. Nothing here imports torch or ray.

The modules in the order of the data:

- `listing` and `source_list` list the files of a source; `files` opens them.
- `readers` has what the readers of all formats share. A reader cuts a file into units of bounded size.
- `sources` returns the records of a source, unit by unit.
- `tokenizers` turns records into tokens, `packing` turns tokens into blocks.
- `source_stream` makes the endless stream of blocks of one source.
- `stream` mixes the sources into the global order, and reads ahead.
"""
