"""`python -m ptx KERNEL`: the compiled code of a kernel beside its source, and a run of it."""

import os

from common.command_line import CommandLine, run_command

KERNELS = (
    "attention_forward",
    "attention_backward_dq",
    "attention_backward_dk_dv",
    "layer_norm_forward",
    "layer_norm_backward",
    "dropout",
    "cross_entropy_forward",
    "cross_entropy_backward",
)


def main():
    """Reads the command line and prints what it asks for."""
    parser = CommandLine(prog="python -m ptx", description=__doc__)
    parser.add_argument("kernel", metavar="KERNEL", choices=KERNELS, help=", ".join(KERNELS))
    parser.add_argument("--chip", choices=("sm_80", "sm_89", "sm_90"), default="sm_90")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    help = "head size D, hidden size H or vocabulary V (default: 64)"
    parser.add_argument("--width", type=int, default=64, help=help)
    parser.add_argument("--tokens", type=int, default=100, help="rows of the input (default: 100)")
    help = "print what this thread of the first program runs, with the registers it writes"
    parser.add_argument("--trace", type=int, nargs="?", const=0, metavar="THREAD", help=help)
    arguments = parser.parse_args()
    if not 1 <= arguments.tokens <= 10_000 or not 1 <= arguments.width <= 100_000:
        raise ValueError("--tokens must be 1 to 10,000, and --width 1 to 100,000")
    if not 0 <= arguments.dropout < 1:
        raise ValueError(f"--dropout must lie in [0, 1), got {arguments.dropout}")
    os.environ.pop("STARENCODER_KERNELS", None)  # the kernels run here whatever it asks for

    name = "_dropout_kernel" if arguments.kernel == "dropout" else f"_{arguments.kernel}"
    gpu = run_kernel(arguments, name)

    from ptx.listing import print_beside_source, print_summary
    from ptx.parser import parse

    if arguments.trace is None:
        text = gpu.texts[name]
        print_beside_source(text, parse(text))
    print_summary(gpu, name)


def run_kernel(arguments, name):
    """Runs the operation that has this kernel. Returns the `Emulator`."""
    import kernels
    from ptx.launch import emulated
    from ptx.listing import print_step

    def trace(machine, step):
        if machine.code.name == name and machine.place == (0, 0, 0):
            if not 0 <= arguments.trace < machine.code.threads:
                last = machine.code.threads - 1
                raise ValueError(f"--trace {arguments.trace}: the threads are 0 to {last}")
            print_step(machine, step, arguments.trace)

    if not kernels.HAS_TRITON:
        raise ValueError("there is no Triton here to compile the kernels")
    with emulated(arguments.chip) as gpu:
        gpu.trace = None if arguments.trace is None else trace
        call_operation(arguments)
    if name not in gpu.texts:  # dropout, with --dropout 0
        raise ValueError(f"{arguments.kernel} does not run with --dropout {arguments.dropout}")
    return gpu


def call_operation(arguments):
    """The operation of a kernel, forward and backward, on random input."""
    import torch

    import kernels

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    tokens = arguments.tokens
    width = arguments.width
    rest = dict(dropout_p=arguments.dropout, seed=0)
    if arguments.kernel.startswith("attention"):
        qkv = torch.randn(tokens, 3, 1, width).to(dtype).requires_grad_()
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
        out = kernels.attention(qkv, cu_seqlens, tokens, **rest)
    elif arguments.kernel.startswith("cross_entropy"):
        logits = torch.randn(tokens, width).to(dtype).requires_grad_()
        out = kernels.cross_entropy(logits.clone(), torch.zeros(tokens, dtype=torch.int64))
    else:
        x = torch.randn(tokens, width).to(dtype).requires_grad_()
        weight = torch.ones(width, requires_grad=True)
        if arguments.kernel == "dropout":
            out = kernels.dropout(x, **rest)
        else:
            out = kernels.layer_norm(x, weight, weight, 1e-12, residual=x, **rest)
    if not arguments.kernel.endswith("forward"):
        out.sum().backward()


if __name__ == "__main__":
    run_command(main)
