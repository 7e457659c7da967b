"""One module per verb of `ddp-kit`, each with `main(argv) -> int`; imported by `ddp_kit.cli.main` when the verb is typed."""
