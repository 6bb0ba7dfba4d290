"""Optimizers by name; Muon and AdamW as one optimizer; a schedule over time."""

import inspect
import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from .options import computes_in_bfloat16


OWN_OPTIMIZERS = ("adamw", "adamw8bit", "muon")
AT_ONCE = 2**26  # numbers that Muon orthogonalises together on a process: each takes 14 bytes meanwhile
NEED_OTHERS = ("LBFGS", "Muon", "SparseAdam", "Optimizer")  # a closure, matrices alone, sparse gradients, a subclass


def warmup_cosine(step: int, warmup_steps: int, progress: float) -> float:
    """Factor of the learning rate: a linear rise over `warmup_steps`, times a cosine from 1 to 0.02.

    Args:
        step (`int`): From 0.
        warmup_steps (`int`): At least 0.
        progress (`float`): Share of the training that is done, in [0, 1]: of its steps, or of its time.
    """
    return min(1.0, (step + 1) / max(warmup_steps, 1)) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def block_matrices(*modules: nn.Module, kinds: tuple[type, ...] = (nn.Linear,)) -> list[nn.Parameter]:
    """The weights of all trainable layers of some kinds inside `modules`, each once: what Muon is made for."""
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, kinds))
    return list(dict.fromkeys(layer.weight for layer in layers if layer.weight.requires_grad))


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of matrices near 1 by five Newton-Schulz iterations, as Muon does.

    The coefficients are those of [Keller Jordan's Muon](https://kellerjordan.github.io/posts/muon/).

    Args:
        matrices (`torch.Tensor` of shape `(matrices, rows, columns)`): Any float dtype, in which it is computed.

    Returns:
        `torch.Tensor` of the shape and dtype of `matrices`.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def orthogonalized_in_shares(matrices: torch.Tensor) -> torch.Tensor:
    """[`orthogonalized`], of which each process of a distributed training computes a share; all have to call it."""
    if num_processes() == 1:
        return orthogonalized(matrices)
    size, rank = math.ceil(len(matrices) / num_processes()), dist.get_rank()
    own = matrices[rank * size : (rank + 1) * size]
    share = torch.zeros(size, *matrices.shape[1:], device=matrices.device)  # float32: all backends know it
    if len(own):
        share[: len(own)] = orthogonalized(own)
    shares = share.new_empty(num_processes() * size, *matrices.shape[1:])
    dist.all_gather_into_tensor(shares, share)
    return shares[: len(matrices)]


class Muon(torch.optim.Optimizer):
    """Muon for matrices, and for kernels of convolutions as matrices of a row for each output channel.

    `torch.optim.Muon` takes matrices alone, one by one, and in bfloat16; here those of one shape are orthogonalised
    together, and in float32 on CPUs that do not compute in bfloat16. Processes of a distributed training, which have
    the same parameters and gradients, share the work out.

    Args:
        params (`Iterable[nn.Parameter]`): Of two dimensions or more.
        lr (`float`): Scaled to the size of AdamW's update: eq. 4 of [Muon is Scalable for LLM
            Training](https://arxiv.org/abs/2502.16982).
        weight_decay (`float`): Decoupled.
        momentum (`float`, defaults to 0.95): Nesterov's.

    Raises:
        ValueError: A parameter has less than two dimensions.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for parameter in self.param_groups[0]["params"]:
            if parameter.ndim < 2:
                raise ValueError(
                    f"`params` have to have two dimensions or more, but one has shape {tuple(parameter.shape)}"
                )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.grad))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    shapes.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for shape, parameters in shapes.items():
                dtype = torch.bfloat16 if computes_in_bfloat16(parameters[0].device) else torch.float32
                rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
                count = max(AT_ONCE // math.prod(shape), 1) * num_processes()
                for some in (parameters[start : start + count] for start in range(0, len(parameters), count)):
                    updates = [p.grad.lerp(self.state[p]["momentum_buffer"], group["momentum"]) for p in some]
                    updates = torch.stack([update.flatten(1).to(dtype) for update in updates])
                    for parameter, update in zip(some, orthogonalized_in_shares(updates), strict=True):
                        parameter.add_(update.view(parameter.shape), alpha=-rate)


class MuonAdamW(torch.optim.Optimizer):
    """[`Muon`] and `torch.optim.AdamW` side by side, with one learning rate that suits both.

    Rates and schedules of AdamW carry over. Without matrices, or without others, it is the one optimizer alone.

    Args:
        matrices (`Iterable[nn.Parameter]`): Parameters for Muon; see [`block_matrices`].
        others (`Iterable[nn.Parameter]`): Parameters for AdamW. Those that are in `matrices` too are left out.
        lr (`float`): Of both; `param_groups` has one group for each that has parameters.
        betas (`tuple[float, float]`): Of AdamW.
        weight_decay (`float`): Of both.

    Raises:
        ValueError: A parameter in `matrices` has less than two dimensions, or there is no parameter at all.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ):
        matrices = list(matrices)
        known = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in others if id(parameter) not in known]
        if not matrices and not others:
            raise ValueError("`matrices` and `others` are both empty, but there has to be a parameter to train")
        self.parts = []
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay))
        super().__init__([part.param_groups[0] for part in self.parts], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's own groups and state."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    matrices: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    /,
    **settings,
) -> torch.optim.Optimizer:
    """Make an optimizer by name.

    Args:
        name (`str`): `"adamw"` (fused), `"adamw8bit"` (of bitsandbytes), `"muon"` ([`MuonAdamW`]), or the name of a
            class in `torch.optim`, such as `"Adafactor"`.
        parameters (`Iterable[nn.Parameter]`): All that learn.
        matrices (`Iterable[nn.Parameter]`): Those of them that `"muon"` is for.
        learning_rate, weight_decay (`float`): The latter for classes that have it.
        **settings: Further arguments of the class. `betas` of the first three are (0.9, 0.98) if not given.

    Raises:
        ValueError: There is no such optimizer, or it does not take these settings.
        ImportError: `"adamw8bit"` without bitsandbytes.
    """
    if name in OWN_OPTIMIZERS:
        settings = {"betas": (0.9, 0.98), "weight_decay": weight_decay} | settings
    if name == "muon":
        kind, arguments = MuonAdamW, (matrices, parameters)
    elif name == "adamw":
        kind, arguments, settings = torch.optim.AdamW, (parameters,), {"fused": True} | settings
    elif name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError as error:
            raise ImportError("`--optimizer adamw8bit` needs bitsandbytes: pip install bitsandbytes") from error
        arguments = (parameters,)
    else:
        kind, arguments = getattr(torch.optim, name, None), (parameters,)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or name in NEED_OTHERS:
            others = sorted(n for n, k in vars(torch.optim).items() if isinstance(k, type) and n not in NEED_OTHERS)
            raise ValueError(
                f"`--optimizer` has to be one of {', '.join(OWN_OPTIMIZERS)} or of torch.optim's {', '.join(others)},"
                f" but is {name!r}"
            )
        if "weight_decay" in inspect.signature(kind).parameters:
            settings = {"weight_decay": weight_decay} | settings
    try:
        return kind(*arguments, lr=learning_rate, **settings)
    except TypeError as error:
        raise ValueError(f"`--optimizer_args`: {name} does not take {settings}: {error}") from error
