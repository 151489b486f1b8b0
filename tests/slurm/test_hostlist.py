"""Slurm's compressed lists of nodes, expanded without Slurm."""

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.slurm.hostlist import expand

# What `scontrol show hostnames` of Slurm 22.05 prints (tests/cluster compares again).
LISTS = {
    "": "",
    "gpu1": "gpu1",
    "gpu[03-07,11]": "gpu03 gpu04 gpu05 gpu06 gpu07 gpu11",
    "rack[1-2]n[01-03]": "rack1n01 rack1n02 rack1n03 rack2n01 rack2n02 rack2n03",
    "a[1-2],b,c[9-11]": "a1 a2 b c9 c10 c11",
    "n[1-2],n2": "n1 n2 n2",
    "n[098-101]": "n098 n099 n100 n101",
    "n[3,1]": "n3 n1",
}
# Slurm writes names with something behind the number one by one; who sets SLURM_STEP_NODELIST need not.
SUFFIXED = {
    "a[1-2]-ib,b,c[9-11]x": "a1-ib a2-ib b c9x c10x c11x",
    "node-0-[1-2].cluster.org": "node-0-1.cluster.org node-0-2.cluster.org",
}


@pytest.mark.parametrize("nodes", LISTS | SUFFIXED)
def test_a_list_is_expanded(nodes: str) -> None:
    assert expand(nodes) == (LISTS | SUFFIXED)[nodes].split()


def test_a_thousand_nodes() -> None:
    assert expand("n[0001-1000]") == [f"n{number:04d}" for number in range(1, 1001)]


@pytest.mark.parametrize(
    "nodes", ["n[1-", "n1-2]", "n[a-b]", "n[]", "n[2-1]", "n[1-2", "n[[1-2]]", "n[1-999999999999]", "n[1-9999][1-9999]"]
)
def test_what_is_no_list_is_refused(nodes: str) -> None:
    with pytest.raises(UserError) as error:
        expand(nodes)
    assert str(error.value).startswith(repr(nodes)) and "gpu[03-07,11]" in str(error.value)
