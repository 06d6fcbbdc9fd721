"""Small pipelines of the real classes with random weights, which need no checkpoint and no network.

Each family has a module here, which `Family.random_models` names. The module has a tuple `PIPELINES` of the classes of
pipelines that it can build, and a function

    pipeline(name, dtype=torch.float32, *, layers=2, heads=2, grid=8)

that returns a pipeline of the class `name` with weights of the data type `dtype`. `layers` is the number of blocks of
each kind, `heads` that of attention heads, and `grid` the side in tokens of a square with the area of a reference and
of a result. Pipelines that take references as they are do not use `grid`.

Most modules also have `transformer(dtype, seed, *, layers, heads)`, and `pipeline_of(transformer)`. Widths of heads,
axes of rotary embedding and ratios of widths are those of the released models; the same arguments give the same
weights. `parts` has what several of these modules share.
"""
