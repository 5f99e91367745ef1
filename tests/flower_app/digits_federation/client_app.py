"""The client: it trains on its own digits, under either strategy."""

from gradsharding_flower import upload_mod
from gradsharding_flower.demo.federation import client_app

app = client_app([upload_mod], seed=7)
