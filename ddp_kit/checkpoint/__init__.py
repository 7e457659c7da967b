"""Checkpoints: sharded, committed whole or not at all, written beside training, restored at any world size.

`storage` file operations · `sharding` who writes what · `layout` the files · `encoding` state as JSON and tensors · `staging` the copy that
training waits for · `commit` the protocol · `saver` the thread · `retention` what stays · `restore` the way back. What a run's state is,
these modules do not know: `ddp_kit.checkpoint.state_dict` does.
"""
