import time
import pytest
from launching import train
@pytest.mark.parametrize("fault", ["SIGKILL", "loss"])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("at", [0,3])
@pytest.mark.parametrize("world_size", [4])
def test_x(fault, rank, tmp_path, world_size, at):
    t=time.time()
    e = train("--fault", fault, "--at-rank", str(rank), *(["--num-workers","1"] if fault=="worker" else []), *(["--max-steps","40"]), *(["--at-step", str(at)]), folder=tmp_path, world_size=world_size)
    print("#####", fault, rank, at, e.codes, time.time()-t)
    print(e.errors[-500:])
    print(e.status if e.run_dir.exists() else None, e.is_clean())
