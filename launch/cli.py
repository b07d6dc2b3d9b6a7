"""The `dpdist` command."""

from __future__ import annotations

from dpdist_launch.ending import end_at_once  # isort: skip  # before any library

import argparse
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from dpdist.cluster.core_files import forbid_core_files
from dpdist.cluster.streams import open_missing_streams
from dpdist.config import file as configfile
from dpdist.config.nearest import did_you_mean
from dpdist.errors import InputError

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Args:
        argv: the command's words; None is those of this process, which is then about to end.
    """
    open_missing_streams()
    forbid_core_files()
    arguments = list(sys.argv[1:] if argv is None else argv)
    top = parser(training=arguments[:1] == ["train"])
    options, rest = top.parse_known_args(arguments)
    # argparse takes `key=value` only next to CONFIG; after an option they come out here.
    if any("=" not in item or item.startswith("-") for item in rest) or (rest and not hasattr(options, "overrides")):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        code = options.run(options)
    except InputError as error:
        print(f"dpdist: error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("dpdist: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has left, as in `dpdist settings | head`
        code = EXIT_FAILED
    code = code if _flush() else code or EXIT_FAILED
    if argv is None and options.run is _train:
        end_at_once(code)
    return code


def _flush() -> bool:
    """Write out what was printed, and return whether stdout took it; a reader that has left is no failure.

    What it does not take is dropped, or Python would try again as it ends, and end with code 120.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return True
        print(f"dpdist: error: stdout cannot be written: {error.strerror}", file=sys.stderr)
        return False
    return True


class _PrintVersion(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import dpdist

        print(f"dpdist {dpdist.__version__}")
        parser.exit(EXIT_DONE)


class _Parser(argparse.ArgumentParser):
    """Answers a misspelled command or choice with the nearest one, and takes no option but by its whole name.

    A shortened one would be read in another way by whatever else looks at the command line, such as a batch script.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            there = ", ".join(map(str, action.choices))
            hint = did_you_mean(value, map(str, action.choices))
            raise argparse.ArgumentError(action, f"no such choice: {value!r}; {hint}there are {there}")


def parser(*, training: bool = False) -> argparse.ArgumentParser:
    """The command line of every command, or of `train` alone, which each rank of a job reads."""
    top = _Parser(prog="dpdist", description="Distributed differentially private training in JAX.")
    top.add_argument("--version", nargs=0, action=_PrintVersion, help="print the version and exit")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a config here, or join the SLURM step this runs in",
        description="Train CONFIG, or go on with the run that its directory holds. Exit codes: 0 finished or budget "
        "exhausted, 75 preempted (SIGTERM or Ctrl-C) and saved: run it again, "
        "130 interrupted at once, 124 stuck, 2 bad input, 1 failed.",
    )
    _add_training(train)
    train.set_defaults(run=_train)
    if training:  # a rank has no use for the modules of the others: 20 ms of each
        return top
    from dpdist_launch import audit, data, predict, report, verify
    from dpdist_launch.measure.bench import command as bench
    from dpdist_launch.measure.scaling import command as scaling
    from dpdist_launch.observe import logs, status
    from dpdist_launch.paths import path_argument
    from dpdist_launch.privacy import command as privacy_of_runs
    from dpdist_launch.privacy import views
    from dpdist_launch.slurm import command as submit
    from dpdist_launch.tune import command as tune

    submit.add_to(commands)
    tune.add_to(commands)

    run_dir = commands.add_parser(
        "run-dir",
        help="the run directory that `train` takes from the same arguments",
        description="Print the run directory of `dpdist train` with these arguments. Starts nothing.",
    )
    _add_training(run_dir)
    run_dir.add_argument("--default", metavar="DIR", help="where neither the arguments nor CONFIG name one")
    run_dir.set_defaults(run=_run_dir)

    plan = commands.add_parser(
        "plan",
        help="what a config would do, without doing it: privacy, work per device, memory, clipping",
        description="Check CONFIG as training would, compile its programs here, and print what it would cost: q, sigma "
        "and epsilon, microbatches and padding per device, memory, and how each parameter's gradient is clipped.",
    )
    plan.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    plan.add_argument("--nodes", type=int, help="share the work among so many nodes instead of this machine's devices")
    plan.add_argument("--gpus-per-node", type=int, metavar="GPUS", help="devices of each node (1; with --device 4)")
    plan.add_argument("--device", metavar="NAME", help="of a cluster elsewhere: A100, H100, ...; compiles nothing")
    plan.add_argument("--devices", type=int, metavar="N", help="how many of them")
    plan.add_argument("--examples", type=int, metavar="N", help="with --device, without the data: training examples")
    plan.add_argument("--columns", metavar="NAME=DTYPE[SHAPE],...", help="with --device, without the data")
    tune.add_law(plan, required=False)
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_plan)

    settings = commands.add_parser(
        "settings",
        help="every key of a config: type, default, meaning, and what changing it does to a run",
        description="List the settings whose name holds PATTERN (or, with * ? or [, matches it as a whole): type, "
        "default, meaning, and what a change does to a run that has begun. As docs/settings.md.",
    )
    settings.add_argument("pattern", nargs="?", metavar="PATTERN", help="such as clip, privacy. or '*.steps' (all)")
    form = settings.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object, setting by name")
    form.add_argument("--markdown", action="store_true", help="print the whole of docs/settings.md")
    settings.set_defaults(run=_settings)

    privacy = commands.add_parser("privacy", help="what plans and runs cost, alone and together")
    questions = privacy.add_subparsers(required=True, metavar="QUESTION")
    for name, text, run in (
        ("epsilon", "epsilon of a noise multiplier", _epsilon),
        ("calibrate", "noise multiplier for an epsilon", _calibrate),
    ):
        question = questions.add_parser(name, help=text)
        question.add_argument("--sampling-probability", type=float, required=True, help="q, in (0, 1]")
        question.add_argument("--steps", type=int, required=True, help="T")
        question.add_argument("--delta", type=float, required=True)
        if name == "epsilon":
            question.add_argument("--noise-multiplier", type=float, required=True, help="sigma")
        else:
            question.add_argument("--target-epsilon", type=float, required=True)
        question.set_defaults(run=run)
    privacy_of_runs.add_to(questions)
    views.add_to(questions)

    diagnose = commands.add_parser(
        "diagnose",
        help="training loss, gradient norms and clipping of a run: private, for the owner of the data alone",
        description="Show what lies under RUN/private of how training goes, and plot it there: the loss and gradient "
        "norms of a few training examples, and the shares of examples clipped or not finite. No guarantee covers it, "
        "nor a choice made by it.",
    )
    diagnose.add_argument("run_dir", type=path_argument, metavar="RUN")
    diagnose.add_argument("--json", action="store_true", help="print one JSON object")
    diagnose.set_defaults(run=_diagnose)

    export = commands.add_parser(
        "export",
        help="parameters, config and privacy statement of a run, to give away",
        description="Write the parameters of the newest checkpoint in RUN_DIR (safetensors), what the model takes and "
        "gives (model.json), the config without paths, and what privacy holds (privacy.json, PRIVACY.md) into a new "
        "directory. Nothing under private/ goes in. Prints what was written as one JSON object.",
    )
    export.add_argument("run_dir", type=path_argument, metavar="RUN_DIR")
    export.add_argument("--to", type=path_argument, required=True, metavar="DIR", help="a new or empty directory")
    export.add_argument(
        "--without-guarantee",
        action="store_true",
        help="export a run whose guarantee does not hold; PRIVACY.md says so",
    )
    export.add_argument(
        "--merge-lora", action="store_true", help="merge the adapters of model.lora into the layers' kernels"
    )
    export.add_argument(
        "--as",
        dest="library",
        metavar="LIBRARY",
        help="transformers or timm: write weights and config.json as it reads them, adapters merged",
    )
    export.add_argument(
        "--sign",
        type=path_argument,
        metavar="KEY",
        help="sign it with this SSH key, such as ~/.ssh/id_ed25519, for `dpdist verify --signer`",
    )
    export.set_defaults(run=_export)

    data.add_to(commands)
    predict.add_to(commands)
    report.add_to(commands)
    verify.add_to(commands)
    audit.add_to(commands)
    status.add_to(commands)
    logs.add_to(commands)
    bench.add_to(commands)
    scaling.add_to(commands)
    return top


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config overrides, e.g. privacy.clip_norm=0.5; `dpdist settings` lists all keys",
    )
    parser.add_argument("--run-dir", help="the run directory (run.dir); an existing run there is resumed")
    parser.add_argument("--processes", type=int, help="start this many processes on this machine")


def _train(options: argparse.Namespace) -> int:
    named = {} if options.run_dir is None else {"run.dir": options.run_dir}
    config = configfile.load(options.config, options.overrides, named)  # before any process is started
    if options.processes is not None:
        from dpdist_launch.local import train_local

        given = [options.config, *options.overrides]
        given += [] if options.run_dir is None else [f"--run-dir={options.run_dir}"]
        return train_local(config, ["train", *given], options.processes)
    gc.disable()  # the collector would look through JAX's modules again and again: a quarter of a second
    from dpdist_launch.training import train_here

    gc.freeze()
    gc.enable()
    return train_here(config)


def _run_dir(options: argparse.Namespace) -> int:
    named = {} if options.run_dir is None else {"run.dir": options.run_dir}
    config = configfile.load(options.config, options.overrides, named, default_run_dir=options.default)
    print(config.run.dir)
    return EXIT_DONE


def _plan(options: argparse.Namespace) -> int:
    from dpdist_launch.plan import plan_report, text
    from dpdist_launch.tune import command as tune

    config = configfile.load(options.config, options.overrides)
    if options.device is None:
        for name in ("devices", "examples", "columns"):
            if (value := getattr(options, name)) is not None:
                raise InputError(f"--{name}", value, "belongs to --device; give that too, such as --device A100.")
        report = plan_report(config, nodes=options.nodes, gpus_per_node=options.gpus_per_node or 1)
    else:
        from dpdist_launch.elsewhere import plan_elsewhere

        per_node = 4 if options.gpus_per_node is None else options.gpus_per_node
        devices = options.devices if options.nodes is None else options.nodes * per_node
        report = plan_elsewhere(
            config,
            device=options.device,
            devices=per_node if devices is None else devices,
            per_node=per_node,
            examples=options.examples,
            columns=options.columns,
        )
    if options.trials is not None:
        report |= {"search": tune.cost_of(report, options)}
    print(json.dumps(report) if options.json else text(report))
    return EXIT_DONE


def _settings(options: argparse.Namespace) -> int:
    from dpdist_launch import settings

    if options.markdown:
        if options.pattern is not None:
            raise InputError("PATTERN", options.pattern, "leave it out: --markdown prints the whole page.")
        print(settings.as_markdown(), end="")
        return EXIT_DONE
    found = settings.settings(options.pattern)
    print(settings.as_json(found) if options.json else settings.as_text(found))
    return EXIT_DONE


def _diagnose(options: argparse.Namespace) -> int:
    from dpdist.run import diagnose

    found = diagnose.diagnose(options.run_dir)
    print(json.dumps(found) if options.json else diagnose.as_text(found))
    return EXIT_DONE


def _export(options: argparse.Namespace) -> int:
    from dpdist.release.export import export

    told = export(
        options.run_dir,
        options.to,
        without_guarantee=options.without_guarantee,
        merge_lora=options.merge_lora,
        library=options.library,
        sign_with=options.sign,
    )
    names = ("guarantee", "epsilon", "delta", "released_after_step", "params_sha256", "statement_sha256")
    print(json.dumps({"to": str(options.to)} | {name: told[name] for name in names}))
    return EXIT_DONE


def _epsilon(options: argparse.Namespace) -> int:
    from dpdist.mechanism import accounting

    spent = _privacy_answer(
        lambda: accounting.epsilon(
            sampling_probability=options.sampling_probability,
            noise_multiplier=options.noise_multiplier,
            steps=options.steps,
            delta=options.delta,
        )
    )
    _print_privacy(options, options.noise_multiplier, spent)
    return EXIT_DONE


def _calibrate(options: argparse.Namespace) -> int:
    from dpdist.mechanism import accounting
    from dpdist.run import calibration

    sigma = _privacy_answer(
        lambda: calibration.calibrate(
            target_epsilon=options.target_epsilon,
            sampling_probability=options.sampling_probability,
            steps=options.steps,
            delta=options.delta,
        )
    )
    spent = accounting.epsilon(
        sampling_probability=options.sampling_probability,
        noise_multiplier=sigma,
        steps=options.steps,
        delta=options.delta,
    )
    _print_privacy(options, sigma, spent)
    return EXIT_DONE


def _privacy_answer(question: Any) -> Any:
    try:
        return question()
    except ValueError as error:
        raise InputError("dpdist privacy", "the numbers given", f"{error}.") from None


def _print_privacy(options: argparse.Namespace, noise_multiplier: float, spent: Any) -> None:
    print(
        json.dumps(
            {
                "epsilon": spent.epsilon,
                "delta": spent.delta,
                "epsilon_rdp": spent.epsilon_rdp,
                "accountant": spent.accountant,
                "noise_multiplier": noise_multiplier,
                "sampling_probability": options.sampling_probability,
                "steps": options.steps,
            }
        )
    )
