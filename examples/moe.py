"""The model, text and pictures of train_moe.py."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS, ROWS = 2, 2  # of a step's batch: two copies of the model take a part each, one copy both


def build() -> Any:
    """Make the same model on every rank: 8 experts in each layer, 2 for a token, and a loss that balances them."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=256, hidden_size=96, head_dim=12, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.1, bos_token_id=10,
        eos_token_id=None, max_position_embeddings=4096, output_router_logits=True))  # fmt: skip


def read_docs() -> Tensor:
    """Read some real text as token ids: this repository's documentation."""
    pages = sorted((Path(__file__).parent.parent / "docs").rglob("*.md"))
    return torch.tensor(list(b"".join(page.read_bytes() for page in pages)))


def batch(text: Tensor, step: int, tokens: int) -> Tensor:
    """Take the text of a step: [parts, rows, tokens]."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - tokens, (PARTS * ROWS,), generator=draw)
    return torch.stack([text[s : s + tokens] for s in starts.tolist()]).view(PARTS, ROWS, tokens)


@torch.no_grad()
def router_load(model: Any, ids: Tensor) -> Tensor:
    """Count the tokens of each expert, in multiples of an even share: [layers, experts]."""
    loads: list[Tensor] = []
    experts = [m for name, m in model.named_modules() if name.endswith("mlp.experts")]
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args: loads.append(torch.bincount(args[1].flatten(), minlength=m.num_experts))
        )
        for m in experts
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    counts = torch.stack(loads).float()
    return counts / counts.mean(1, keepdim=True)


def draw_losses(file: Path, alone: Tensor, losses: Tensor, resumed: int, plans: list[str]) -> None:
    """Draw the curve of one process, and on top of it that of the plans."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes, steps = figure.subplots(), torch.arange(len(alone))
    axes.plot(steps, alone, color="#c9d7e6", linewidth=6, label="one process")
    axes.plot(
        steps[: resumed + 1], losses[: resumed + 1], color="#1b6ca8", linewidth=1.4, label=plans[0]
    )
    axes.plot(
        steps[resumed:],
        losses[resumed:],
        color="#b8552b",
        linewidth=1.4,
        label=f"{plans[1]}, from its checkpoint",
    )
    axes.axvline(resumed, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="step", ylabel="loss, nats a byte, with the balancing loss", xlim=(0, len(alone) - 1)
    )
    axes.set_title(
        f"largest difference from one process: {(losses - alone).abs().max():.1e}",
        loc="left",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(file)


def draw_routers(file: Path, before: Tensor, after: Tensor) -> None:
    """Draw how busy the experts are, before and after training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), dpi=150, layout="constrained")
    both = figure.subplots(1, 2)
    for axes, loads, when in zip(both, (before, after), ("before training", "after"), strict=True):
        axes.imshow(loads, cmap="Blues", vmin=0, vmax=4, aspect="auto")
        for layer, expert in torch.cartesian_prod(*map(torch.arange, loads.shape)).tolist():
            load = float(loads[layer, expert])
            color = "white" if load > 2 else "#333333"
            axes.text(
                expert, layer, f"{load:.1f}", ha="center", va="center", fontsize=8, color=color
            )
        axes.set(title=when, xlabel="expert", ylabel="layer", yticks=range(len(loads)))
    figure.colorbar(both[1].images[0], ax=both, label="tokens / even share")
    figure.savefig(file)
