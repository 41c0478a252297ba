"""Decoder layers one after the other: where they come from, and what runs them.

`provider`: a `LayerProvider` holds one decoder layer at a time; `InMemoryLayers` has all of
them, `StreamedLayers` reads them from the checkpoint, and `open_layers` chooses.
`runner`: a `LayerPass` takes batches through the layers in order, keeps what each returned in
memory up to a limit and in files beyond it, and goes on after the last finished layer of an
interrupted process where it has a work directory. `run_layers` drives a `LayerTask` over it: a
method subclasses that, says in `visit` what it does to a layer and in `state` what must not be
lost, and writes nothing about files, resuming or memory. A task that only `watches` runs whole
forward passes where the model is in memory; logits come from the head at the end.
`replay` runs one layer as the whole model would; `outputs` stores what layers return.
"""
