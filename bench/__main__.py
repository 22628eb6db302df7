"""TODO."""

import torch

import kernels
from bench.data_speed import bench_corpus, bench_data
from bench.kernel_speed import bench_kernels, bench_tune
from bench.model_speed import bench_model, bench_profile
from bench.pii_speed import bench_pii
from bench.resources import bench_resources
from common.command_line import CommandLine, run_command


def main(argv=None):
    """The command line."""
    parser = CommandLine(
        prog="python -m bench", description="Measure the speeds that the README claims."
    )
    parser.add_argument("what", choices=["data", "kernels", "model", "pii"])
    parser.add_argument(
        "--resources",
        action="store_true",
        help="kernels: compile for sm_80, sm_89, sm_90, sm_100 and show what they take",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="kernels: try other launch settings on this GPU and print a table of the best",
    )
    parser.add_argument(
        "--ablate", action="store_true", help="model: what each saving of the step is worth"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="model: where the time of a step goes, beside the least that it could take",
    )
    parser.add_argument(
        "--megabytes",
        type=int,
        default=100,
        metavar="N",
        help="pii: how much to look through (default: 100)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the JSON file to write (default: one in results/)"
    )
    arguments = parser.parse_args(argv)
    flags = {
        "data": [],
        "kernels": ["resources", "tune"],
        "model": ["ablate", "profile"],
        "pii": [],
    }
    given = [flag for flag in sum(flags.values(), []) if getattr(arguments, flag)]
    if len(given) > 1 or not {*given} <= {*flags[arguments.what]}:
        takes = " or ".join(f"--{flag}" for flag in flags[arguments.what]) or "no flag"
        raise ValueError(f"{arguments.what}: takes {takes}, one at a time")
    if arguments.what == "data":
        bench_data(arguments.out)
        return bench_corpus(arguments.out and f"{arguments.out}.corpus")
    if arguments.what == "pii":
        return bench_pii(arguments.out, size=arguments.megabytes * 1_000_000)
    if arguments.what == "model":
        return (
            bench_profile(arguments.out)
            if arguments.profile
            else bench_model(arguments.out, ablate=arguments.ablate)
        )
    if arguments.tune and not torch.cuda.is_available():
        raise ValueError("--tune: needs a CUDA device")
    if not kernels.HAS_TRITON or kernels.INTERPRETED:
        raise ValueError(
            "kernels: needs Triton, and TRITON_INTERPRET and STARENCODER_KERNELS unset"
        )
    if arguments.tune:
        bench_tune(arguments.out)
    elif torch.cuda.is_available() and not arguments.resources:
        bench_kernels(arguments.out)
    else:
        if not arguments.resources:
            print(
                "There is no CUDA device here, and on a CPU the speed of these kernels means nothing. What they take of a chip:"
            )
        bench_resources(arguments.out)


if __name__ == "__main__":
    run_command(main)
