"""The command line: `python -m bench kernels|model|data|corpus|pii|embed|search|tasks|...`.

Each measurement prints a table and writes it, with the machine and the versions, to results/.
"""

from common.command_line import CommandLine, run_command
from pii import SHIPPED

# Each measurement is imported only if it is asked for: together they take ten seconds, and --help
# should take none.


def main(argv=None):
    """The command line."""
    parser = CommandLine(prog="python -m bench", description="Measure the figures in results/.")
    commands = parser.add_subparsers(required=True, dest="what", metavar="WHAT")

    # Commands of their own, since each has its own flags.
    def command(name, help):
        return commands.add_parser(name, help=help, description=help)

    # What can be measured, and one thing that can be drawn.
    kernels = command("kernels", "Triton kernels beside their peers (GPU)")
    model = command("model", "a training step beside transformers' models")
    data = command("data", "from tokens on disk to batches, beside tokenizing on the fly")
    corpus = command("corpus", "from text to tokens on disk, beside datatrove's tokenizer")
    pii = command("pii", "personal data and secrets in real code, beside other detectors")
    search = command("search", "finding functions by their docstrings, beside BM25")
    tasks = command("tasks", "five tasks, fine-tuned from pretrained and from random weights")
    embed = command("embed", "vectors of source code beside sentence-transformers")
    simulation = command("simulation", "simulated runs of 2 and 4 ranks beside real ones, killed")
    speedrun = command("speedrun", "a race to a held-out loss: your recipe beside the record's")
    pictures = command("pictures", "draw the front page's two pictures from a run")

    # Flags that only one of them has. One run measures one thing.
    choices = kernels.add_mutually_exclusive_group()
    help = "compile for sm_80, sm_89, sm_90 and sm_100, and show what the kernels take of each"
    choices.add_argument("--resources", action="store_true", help=help)
    help = "try other launch settings on this GPU and print the best"
    choices.add_argument("--tune", action="store_true", help=help)
    help = "show where the time of a step goes, beside the least that it could take"
    model.add_argument("--profile", action="store_true", help=help)

    help = "your recipe, a JSON file; default: the newest record, which then races its predecessor"
    speedrun.add_argument("recipe", nargs="?", metavar="RECIPE", help=help)
    help = "the recipe to beat (default: the newest in results/speedrun, or the one before)"
    speedrun.add_argument("--record", metavar="FILE", help=help)
    speedrun.add_argument("--seeds", type=int, default=3, metavar="N", help="default: 3")
    help = "run the recipe of this result again, and compare its figures"
    speedrun.add_argument("--verify", metavar="FILE", help=help)

    for measurement in (search, tasks):
        measurement.add_argument("--encoder", default="runs/tiny", metavar="RUN", help="a run")
        help = "fine-tunings of each kind (default: 3)"
        measurement.add_argument("--seeds", type=int, default=3, metavar="N", help=help)

    help = "of synthetic code; all contenders read the first (default: 1)"
    corpus.add_argument("--gigabytes", type=float, default=1.0, metavar="N", help=help)

    help = "the detector (default: the shipped one)"
    pii.add_argument("--model", metavar="DIR", default=SHIPPED, help=help)

    # The flag that all measurements share.
    text = (data, corpus, pii, embed, search, tasks)
    for measurement in (kernels, model, simulation, speedrun, *text):
        help = "the JSON file to write (default: one in results/, named after the device)"
        measurement.add_argument("--out", metavar="FILE", help=help)
    pictures.add_argument("run", metavar="RUN", help="a run directory, such as runs/tiny")

    arguments = parser.parse_args(argv)
    run(arguments)


def run(arguments):
    """Imports the measurement that is asked for, and nothing else, and starts it."""
    if arguments.what == "kernels":
        measure_kernels(arguments)  # of three kinds
    elif arguments.what == "model" and arguments.profile:
        from bench.step_profile import bench_profile

        bench_profile(arguments.out)
    elif arguments.what == "model":
        from bench.model_speed import bench_model

        bench_model(arguments.out)
    elif arguments.what == "data":
        from bench.data_speed import bench_data

        bench_data(arguments.out)
    elif arguments.what == "corpus":
        from bench.corpus_speed import bench_corpus

        bench_corpus(arguments.out, arguments.gigabytes)
    elif arguments.what == "pii":
        from bench.pii_real import bench_pii

        bench_pii(arguments.out, arguments.model)
    elif arguments.what == "search":
        from bench.search import bench_search

        bench_search(arguments.out, arguments.encoder, arguments.seeds)
    elif arguments.what == "tasks":
        from bench.tasks import bench_tasks

        bench_tasks(arguments.out, arguments.encoder, arguments.seeds)
    elif arguments.what == "embed":
        from bench.embed_speed import bench_embed

        bench_embed(arguments.out)
    elif arguments.what == "simulation":
        from bench.simulation import bench_simulation

        bench_simulation(arguments.out)
    elif arguments.what == "speedrun":
        from bench import speedrun

        if arguments.verify:
            speedrun.verify(arguments.verify)
        else:
            record, recipe = speedrun.contenders_of(arguments.record, arguments.recipe)
            speedrun.bench_speedrun(recipe, record, arguments.seeds, arguments.out)
    else:
        from bench.pictures import draw_pictures

        draw_pictures(arguments.run)


def measure_kernels(arguments):
    """Speeds, launch settings, or what the kernels take of a chip."""
    import torch

    import kernels
    from bench.kernel_speed import bench_kernels, bench_tune
    from bench.resources import bench_resources

    # What cannot work is refused before anything is compiled.
    if arguments.tune and not torch.cuda.is_available():
        raise ValueError("--tune: needs a CUDA device")
    if not kernels.HAS_TRITON or kernels.INTERPRETED:
        needed = "Triton, and TRITON_INTERPRET and STARENCODER_KERNELS unset"
        raise ValueError(f"kernels: needs {needed}")

    # Without a GPU only the last one is possible.
    if arguments.tune:
        bench_tune(arguments.out)
    elif torch.cuda.is_available() and not arguments.resources:
        bench_kernels(arguments.out)
    else:
        # A CPU can compile the kernels for any chip, but it says nothing about their speed.
        if not arguments.resources:
            print("There is no CUDA device here: no speeds, but what the kernels take of a chip.")
        bench_resources(arguments.out)


if __name__ == "__main__":
    run_command(main)
