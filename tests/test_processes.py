"""Two processes on this machine, gloo between them: what is averaged, what is local, what is sharded.

Oracle: one process with the whole batch, or with one part of it.
"""

import json
import os
import socket

import pytest
import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group

from bpdiag import diagnosis, watch

torch.set_num_threads(1)

PARTS = [torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


WRAPPERS = {"ddp": nn.parallel.DistributedDataParallel, "fsdp": sharded, "none": lambda model: model}


def trained(wrap, x, lr=0.1):
    model = WRAPPERS[wrap](net())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with watch(model, optimizer) as watching:
        for _ in range(3):
            watching.loss(model(x).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    trace = watching.trace
    rows = {f"{r['layer']} {r['step']}": r for r in trace.to_arrow().to_pylist()}
    kinds = {layer.name: layer.kind for layer in trace.layers}
    return {"rows": rows, "kinds": kinds, "meta": trace.meta, "notes": diagnosis.notes(trace)}


def process(rank, wrap, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_process_group("gloo", rank=rank, world_size=2)
    try:
        told = trained(wrap, PARTS[rank])
        told["still"] = trained(wrap, PARTS[rank], lr=0.0)["rows"]
    finally:
        destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def both(request, tmp_path_factory):
    """What each process measured."""
    folder = tmp_path_factory.mktemp(request.param)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (request.param, port, folder), nprocs=2)
    return request.param, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_layers_have_the_names_and_kinds_they_have_alone(both):
    for told in both[1]:
        assert told["kinds"] == {"0": "linear", "1": "relu", "2": "linear"}
        assert told["meta"]["unseen"] == []


def test_outputs_and_cotangents_are_those_of_the_process(both):
    for rank, told in enumerate(both[1]):
        alone = trained("none", PARTS[rank])["rows"]
        for layer in ("0", "2"):
            for name in ("z_norm", "g_z_norm"):
                assert told["rows"][f"{layer} 0"][name] == pytest.approx(alone[f"{layer} 0"][name], rel=1e-6)
        assert told["meta"]["rank"] == rank
        assert told["meta"]["processes"] == 2


def test_weights_and_their_gradients_are_those_of_all(both):
    whole = trained("none", torch.cat(PARTS))["rows"]
    for told in both[1]:
        for place in ("0 0", "2 0", "0 2", "2 2"):
            for name in ("W_rms", "g_W_norm", "dW_rms"):
                assert told["rows"][place][name] == pytest.approx(whole[place][name], rel=1e-5), (place, name)


def test_the_local_gradient_is_kept_beside_the_averaged_one(both):
    """Weights that stand still have the same gradients at every step; the second sample tells the local one."""
    wrap, told = both
    for rank, one in enumerate(told):
        local, averaged = (one["still"]["0 2"][name] for name in ("g_W_raw_norm", "g_W_norm"))
        if wrap == "fsdp":  # its own gradient is never whole on any process
            assert local == averaged
        else:
            assert local == pytest.approx(trained("none", PARTS[rank])["rows"]["0 0"]["g_W_norm"], rel=1e-6)
            assert local != pytest.approx(averaged, rel=1e-3)
            assert any("averaging over processes" in note for note in one["notes"])
