import re
import tomllib
from pathlib import Path

import pytest
import yaml

from hivetrain.cli import LIGHTNING_COMMANDS, _parser, main

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def in_repository(path):
    """What the image has at ``path``, below its copy of everything that .dockerignore lets through."""
    relative = Path(path).relative_to("/app")
    assert f"!{relative.parts[0]}" in (ROOT / ".dockerignore").read_text().splitlines(), f"the image has no {path}"
    return ROOT / relative


def words_of(service):
    return [*service.get("entrypoint", ["hivetrain"]), *service.get("command", [])]


def test_it_has_a_bootstrap_two_miners_and_a_validator():
    assert list(SERVICES) == ["bootstrap", "miner-1", "miner-2", "validator"]
    assert SERVICES["miner-1"]["command"] == SERVICES["miner-2"]["command"]
    assert {service["image"] for service in SERVICES.values()} == {"hivetrain:${DEVICE:-cpu}"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_file_that_a_service_names_exists_or_is_behind_a_profile(name):
    paths = [path for word in words_of(SERVICES[name]) for path in re.findall(r"(?:^|=)(/app/.+)", word)]
    assert paths or name == "bootstrap"
    missing = [path for path in paths if not in_repository(path).is_file()]
    assert not missing or "profiles" in SERVICES[name]


@pytest.mark.parametrize("name", SERVICES)
def test_every_command_of_a_service_exists(name):
    program, *arguments = words_of(SERVICES[name])
    if program == "hivetrain" and arguments:
        if arguments[0] not in LIGHTNING_COMMANDS:
            _parser().parse_args(arguments)
    else:
        assert program in ("hivetrain", "python")


def test_the_image_runs_a_bootstrap_server_that_its_health_check_asks():
    command = re.search(r"^CMD (\[.*?\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    args = _parser().parse_args(yaml.safe_load(command[1].replace("\\\n", "")))
    assert (args.host, args.port) == ("0.0.0.0", 8000)
    assert f"http://127.0.0.1:{args.port}/health" in DOCKERFILE
    assert SERVICES["miner-1"]["environment"] == {"HIVETRAIN_INITIAL_PEERS": f"http://bootstrap:{args.port}"}
    volume = SERVICES["bootstrap"]["volumes"][0].partition(":")[2]
    assert args.identity_path.startswith(volume + "/"), "the identity has to outlive the container"


def test_the_image_has_every_extra_of_a_running_program():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"/app\[(.*?)\]", DOCKERFILE)[1].split(",")) == set(extras) - {"dev"}


def test_volumes_and_dependencies_are_declared():
    for service in SERVICES.values():
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= set(COMPOSE["volumes"])
        assert set(service.get("depends_on", {})) <= set(SERVICES)


def test_the_image_does_not_run_as_root():
    assert re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE) == ["hivetrain"]


def test_the_miners_options_are_understood(capsys):
    program, *arguments = words_of(SERVICES["miner-1"])
    assert program == "hivetrain"
    arguments = [re.sub("/app/.+", lambda path: str(in_repository(path[0])), word) for word in arguments]
    assert main([*arguments, "--print_config"]) == 0
    strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]
    assert strategy["host_maddrs"] == ["/ip4/0.0.0.0/tcp/31337"]
    assert strategy["initial_peers"] is None, "the environment variable would not be read"
