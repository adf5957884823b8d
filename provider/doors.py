"""What every route for users asks, whatever it is for: whether a change is meant."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from airflow.configuration import conf
from fastapi import HTTPException, Request, status


def check_is_json(headers: Mapping[str, str]) -> None:
    """Refuse what is said to be something else than JSON, or is not said to be anything."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise HTTPException(
            status.HTTP_415_UNSUPPORTED_MEDIA_TYPE,
            f"the body is {media_type or 'of no type'}, and must be application/json",
        )


def check_is_meant(request: Request) -> None:
    """
    Refuse a change that a page from elsewhere may have asked for, with the cookie that the browser adds.

    Such a page can neither say that a body is JSON nor send a token, unless Airflow allows it to, and cannot
    change what the browser says of where it is from.
    """
    headers = request.headers
    check_is_json(headers)
    if headers.get("authorization", "").partition(" ")[0].lower() == "bearer":
        return
    if (site := headers.get("sec-fetch-site")) is not None:
        is_from_here = site == "same-origin"
    else:  # an older browser, or one that does not trust the connection
        here = {headers.get("host"), urlsplit(conf.get("api", "base_url", fallback="") or "").netloc}
        is_from_here = urlsplit(headers.get("origin", "")).netloc in here - {None, ""}
    if not is_from_here:
        raise HTTPException(
            status.HTTP_403_FORBIDDEN,
            "a cookie alone changes nothing: send a token (Authorization: Bearer), or the Origin of this Airflow",
        )
