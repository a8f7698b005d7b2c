"""Which process this is, and meeting the others, after a restart too."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from aclip.engine import launch
from aclip.engine.launch import Place, find_place, fresh_store
from aclip.errors import ConfigError


def test_nothing_in_the_environment_is_one_process() -> None:
    assert find_place({}) == Place()
    assert find_place({"SLURM_NTASKS": "4"}) == Place()  # an allocation without a step


def test_torchrun_and_slurm_say_who_this_is() -> None:
    assert find_place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(5, 8, 1)
    slurm = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
             "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node1"}
    assert find_place(slurm) == Place(2, 4, 0, ("node1", 20007))
    with pytest.raises(ConfigError, match="RANK is 'x', not a number"):
        find_place({"RANK": "x", "WORLD_SIZE": "8"})


def test_a_name_and_a_port_that_are_given_come_first() -> None:
    asked = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "node[7-8]",
             "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    assert find_place(asked).master == ("head", 29500)


def test_hosts_that_cannot_be_listed_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"first host of Slurm's list 'node\[7-8\]': set MASTER_ADDR"):
        find_place({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "node[7-8]"})


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


@pytest.mark.parametrize(("rank", "waits", "sentence"), [("0", [], "no data"), ("3", [launch.RANK_0_SPEAKS],
                                                                             "rank 3: no data")])
def test_rank_0_speaks_first_and_the_others_say_who_they_are(
    rank: str, waits: list[float], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError) as found, launch.speaking_in_turn():
        raise ConfigError("no data")
    assert (str(found.value), waited) == (sentence, waits)
