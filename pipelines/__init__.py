"""nlray.pipelines: text on any fsspec URL to blocks of tokens, with numpy and Arrow only.

Follow a batch: `files` lists a source's files, `readers` cut them into units of bounded size, `sources` gives a source's
records unit by unit, `tokenizers` turns them into tokens, `packing` into blocks, `source_stream` makes one source's endless
stream of blocks, `stream` mixes the sources into the global order and reads ahead.
"""
