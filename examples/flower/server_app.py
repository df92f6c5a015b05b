"""The half of the server: it averages adapters, and finds groups."""

from hilora.federated.deploy.flower import server_app

app = server_app()
