from pla_serve.cli import app

app()
