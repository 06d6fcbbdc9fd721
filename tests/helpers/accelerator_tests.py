"""A pytest plugin (`-p accelerator_tests`) that runs diffusers' tests which require any accelerator on the CPU as well.

Tests of offloading, layerwise casting and compilation have this mark, although most of them need none.
"""

REASONS = ("test requires a hardware accelerator", "test requires accelerator+PyTorch")


def pytest_collection_modifyitems(items):
    for node in {node for item in items for node in item.listchain()}:
        node.own_markers = [
            mark for mark in node.own_markers if mark.name != "skipif" or mark.kwargs.get("reason") not in REASONS
        ]
