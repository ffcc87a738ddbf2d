"""The operations that are dispatched inside a block: what a GPU would have to launch."""

from torch.utils._python_dispatch import TorchDispatchMode

# What moves no data and launches nothing.
VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "expand", "narrow", "new_empty", "permute", "reshape",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias",
    "lift_fresh",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """The names of the operations inside, without views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **kwargs or {})
