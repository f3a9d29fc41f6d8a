"""Train an agent: ``python scripts/train.py --env hopper-medium``; ``--help`` lists every option."""

from flowrl.errors import exit_on_user_error
from flowrl.training.config import parse_train_config
from flowrl.training.run import train

if __name__ == "__main__":
    with exit_on_user_error():
        train(parse_train_config())
