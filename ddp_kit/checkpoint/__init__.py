"""Checkpoints: sharded, committed whole or not at all, written beside training, restored at any
world size.

`format/` has the bytes and knows nothing of training: `storage` file operations · `layout` the
files · `encoding` state as JSON and tensors · `sharding` who writes what · `shard` a rank's file ·
`staging` the copy that training waits for · `commit` the protocol · `writer` the thread · `reader`
the way back · `opened` a checkpoint that was read · `fit` whether its tensors are those wanted.

Above it: `state_dict` what a run's state is, and `optimizer_state` the optimizer's part of it ·
`checkpointer` when a run saves · `resume` what may differ when it goes on · `retention` what
stays · `find` what a path means · `weights` and `init_from` a model's weights alone.
"""
