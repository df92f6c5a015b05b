"""The network that the tests of the deployment stand on: who may take part, and that nothing remains of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.federated.deploy.certificates import make_certificates, make_node_key
from tests.federated.deploy.loopback import free_port, loopback, until
from tests.federated.deploy.nursery import ask
from tests.federated.deploy.recorder import recorder

pytestmark = pytest.mark.slow


def test_only_those_who_know_each_other_take_part_and_nothing_remains(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    foreign = make_certificates(other).authority
    with loopback(tmp_path) as link:
        with recorder(link.certificates, link.port) as record:
            link.start_node(0, {"client-id": 0}, record.address)
            assert "/v1/fleet/activate-node" in {request.path for request in record.requests()}
        known = tmp_path / "node0.key"

        def attempt(name: str, authority: Path, key: Path) -> str:
            pid = link.start(
                *("flower-supernode", "--superlink", link.address, "--port", str(free_port()), "--max-retries", "1"),
                *("--root-certificates", str(authority), "--auth-supernode-private-key", str(key)),
                log=name,
            )
            until(lambda: ask(link.nursery, do="code", pid=pid) is not None, f"{name} ends")
            return link.log(name)

        assert "SuperNode ID" not in attempt("unregistered", link.certificates.authority, make_node_key(other / "key"))
        assert "SuperNode ID" not in attempt("deceived", foreign, known)
        assert "CERTIFICATE_VERIFY_FAILED" in link.log("deceived")
        running = ask(link.nursery, do="running", name="", under=0)
        assert len(running) >= 4  # a SuperLink and a SuperNode, with a SuperExec each
    for pid in running:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
