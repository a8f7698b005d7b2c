"""Which process this is, from what torchrun and Slurm say; and meeting the others, after a restart too."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from aclip.engine.launch import Place, find_place, fresh_store
from aclip.errors import ConfigError

SRUN = {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "50007",
        "SLURM_STEP_NODELIST": "node7"}


def test_a_process_without_company() -> None:
    assert find_place({}) == Place()


def test_torchrun_names_the_place_itself() -> None:
    assert find_place({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **SRUN}) == Place(3, 8, 1)


def test_a_task_of_srun_meets_the_others_at_the_first_host() -> None:
    assert find_place(SRUN) == Place(9, 16, 1, ("node7", 30007))
    asked = {**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "29500", "SLURM_STEP_NODELIST": "node[7-8]"}
    assert find_place(asked).master == ("head", 29500)


def test_an_allocation_is_no_step() -> None:
    """In `salloc` Slurm's variables are there, and one process alone."""
    assert find_place({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}) == Place()


def test_hosts_that_cannot_be_listed_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"first host of Slurm's list 'node\[7-8\]': set MASTER_ADDR"):
        find_place({**SRUN, "SLURM_STEP_NODELIST": "node[7-8]"})


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match="the environment variable RANK is 'x', not a number"):
        find_place({"RANK": "x", "WORLD_SIZE": "2"})


def test_processes_that_start_anew_find_nothing_of_those_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun does it: the store lives on, and keeps what processes wrote that were killed."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server.set("aclip/call/1", "of a process that was killed while it called")

    for _ in range(3):
        with ThreadPoolExecutor(3) as ranks:
            stores = list(ranks.map(lambda rank: fresh_store(Place(rank, 3)), range(3)))
        assert not stores[0].check(["address"])
        stores[0].set("address", "here")
        assert [store.get("address") for store in stores] == [b"here"] * 3
