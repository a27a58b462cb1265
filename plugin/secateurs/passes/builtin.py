"""The built-in passes and cost models, registered through the same hooks as anybody's; imports none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from secateurs.attention import AttentionHeads
    from secateurs.interfaces import CostModel
    from secateurs.passes.base import Pass
    from secateurs.registry import Registrar

hookimpl = pluggy.HookimplMarker("secateurs")


@hookimpl
def secateurs_register_passes(register: Registrar[type[Pass]]) -> None:
    """Register the built-in passes."""
    register(
        "cka-cluster",
        "secateurs.passes.cka_cluster:CkaCluster",
        summary="bypass blocks whose representations barely differ (CKA clusters, MPruner)",
        settings="secateurs.settings:CkaClusterSettings",
    )
    register(
        "cka-segment",
        "secateurs.passes.cka_segment:CkaSegment",
        summary="bypass the blocks whose removal costs least, one of every segment of similar blocks stays (SGLP)",
        settings="secateurs.settings:CkaSegmentSettings",
    )
    register(
        "mi-nodes",
        "secateurs.passes.mi_nodes:MiNodes",
        summary="remove the units that carry least information to their readers, and refit (MIPP)",
        settings="secateurs.settings:MiNodesSettings",
    )
    register(
        "magnitude",
        "secateurs.passes.baselines:Magnitude",
        summary="remove the units of smallest weight norm (Torch-Pruning's group magnitude), the usual baseline",
        settings="secateurs.settings:MagnitudeSettings",
    )
    register(
        "taylor",
        "secateurs.passes.baselines:Taylor",
        summary="remove the units that the loss is least sensitive to (Torch-Pruning's group Taylor), a baseline",
        settings="secateurs.settings:BaselineSettings",
    )
    register(
        "random-nodes",
        "secateurs.passes.baselines:RandomNodes",
        summary="remove units at random, the baseline that has to be beaten",
        settings="secateurs.settings:BaselineSettings",
    )
    register(
        "random-blocks",
        "secateurs.passes.block_baselines:RandomBlocks",
        summary="bypass blocks drawn at random, the baseline for depth",
        settings="secateurs.settings:RandomBlocksSettings",
    )
    register(
        "block-influence",
        "secateurs.passes.block_baselines:BlockInfluence",
        summary="bypass the blocks that change the direction of their input least (ShortGPT), a baseline for depth",
        settings="secateurs.settings:BlockInfluenceSettings",
    )
    register(
        "loss-greedy",
        "secateurs.passes.block_baselines:LossGreedy",
        summary="bypass, one by one, the block without which the loss is lowest (SLEB), a baseline for depth",
        settings="secateurs.settings:LossGreedySettings",
    )


@hookimpl
def secateurs_describe_attention(module: nn.Module) -> AttentionHeads | None:
    """Describe attention modules by the usual names of their children."""
    from secateurs.attention import describe

    return describe(module)


@hookimpl
def secateurs_register_cost_models(register: Registrar[CostModel]) -> None:
    """Register MACs and parameters."""
    register("macs", "secateurs.cost:macs", summary="multiply-accumulates of one example")
    register("parameters", "secateurs.cost:parameters", summary="number of parameters")
