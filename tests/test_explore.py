import time
import pytest
from launching import train
@pytest.mark.parametrize("fault", ["", "loss", "callback", "worker", "recipe", "empty","small","labels","no parameters","foreign","extra","part","unused","nan","SIGTERM","SIGINT","SIGKILL","SIGUSR1"])
@pytest.mark.parametrize("rank", [0, 1])
def test_x(fault, rank, tmp_path):
    t=time.time()
    e = train("--fault", fault, "--at-rank", str(rank), *(["--num-workers","1"] if fault=="worker" else []), *(["--max-steps","40"]), folder=tmp_path, world_size=2)
    print("#####", fault, rank, e.codes, time.time()-t)
    print(e.errors)
    print("OUT", e.outputs)
    print(e.status if e.run_dir.exists() else None, e.is_clean(), sorted(p.name for p in e.run_dir.rglob("*")))
