"""The half of a client: it trains on images that stay with it."""

from hilora.federated.deploy.flower import client_app

app = client_app()
