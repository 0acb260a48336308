"""Recipes and what they cost today: a site that has long used Flask-Caching and keeps it.

    RECIPES_MARKET_URL=http://127.0.0.1:8080/prices flask --app examples/recipes/app.py run

One line more, `strategies = CacheStrategies(app, cache=cache)`, puts the strategies over the Cache
that is there, and one function uses them: `prices` was `@cache.memoize(60)`. What has changed:

- When its minute was over, each of the threads that were asked asked the market. Now one does.
- While the market was away, every page with a price was a 500. Now the last prices are shown, for a
  day at most.

The pages under `@cache.cached`, the fragment in the template and the settings are as they were.
"""

import json
from urllib.request import urlopen

from flask import Flask, abort, render_template
from flask_caching import Cache

from flask_muset import CacheStrategies

app = Flask(__name__)
app.config["CACHE_TYPE"] = "SimpleCache"
app.config["MARKET_URL"] = "http://127.0.0.1:8080/prices"
app.config["PRICES_EXPIRE"] = 60
app.config.from_prefixed_env("RECIPES")

cache = Cache(app)
strategies = CacheStrategies(app, cache=cache)

#: Ingredients in grams.
RECIPES = {
    "pancakes": {"flour": 200, "milk": 400, "eggs": 120},
    "porridge": {"oats": 80, "milk": 300},
}


def ask_market():
    """Prices of a kilogram, from the market's slow server."""
    with urlopen(app.config["MARKET_URL"], timeout=5) as answer:  # noqa: S310 - set by the operator
        return json.load(answer)


def prices():
    """Prices of a kilogram."""
    return strategies.cache_aside(
        "prices", ask_market, expire=app.config["PRICES_EXPIRE"], stale_if_error=86_400
    )


@app.get("/")
@cache.cached(timeout=3600)
def index():
    """All recipes; the page is kept for an hour."""
    return render_template("index.html", recipes=sorted(RECIPES))


@app.get("/<name>")
def recipe(name):
    """A recipe with its cost; the list of ingredients is a fragment that is kept."""
    if name not in RECIPES:
        abort(404)
    today = prices()
    cost = sum(grams * today[ingredient] / 1000 for ingredient, grams in RECIPES[name].items())
    return render_template("recipe.html", name=name, ingredients=RECIPES[name], cost=cost)
