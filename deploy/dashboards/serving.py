"""The dashboard "Serving": who asks, how fast replies come, what room is left, and whether swaps go well."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.dashboards.panels import Panel, Query, board, lines, number, quantile, quantiles, rate, seen, share

CHATS = 'route="/v1/chat/completions"'


def serving() -> Dashboard:
    """For whoever keeps the servers running."""
    return board(
        "heed-serving",
        "Heed: Serving",
        "Traffic, speed, room and swaps of all servers together.",
        {
            "Now": now(),
            "Traffic": traffic(),
            "Speed of replies": speed(),
            "Room": room(),
            "Versions and the log": versions(),
        },
        refresh="30s",
    )


def now() -> list[Panel]:
    return [
        number(
            "Servers",
            "Servers that Prometheus sees, and those of them that can answer chats.",
            "both are the number of servers that you started.",
            "fewer are ready than are seen for longer than a model takes to load, or fewer are seen than were started.",
            "none",
            [Query('sum(up{job="heed-server"})', "seen"), Query("sum(heed_ready)", "ready")],
        ),
        number(
            "Chats",
            "Chats answered a second.",
            "about what it was at this hour on other days.",
            "none while people use your application: look at its own log, and at the proxy's.",
            "reqps",
            [Query(rate(f"heed_requests_total{{{CHATS}}}"), "chats")],
        ),
        number(
            "Failed",
            "Share of requests under /v1 that were answered with a 5xx status.",
            "0.",
            "above one in a hundred: the server's log has the traceback of each.",
            "percentunit",
            [
                Query(
                    share(
                        rate('heed_requests_total{route=~"/v1/.*",status=~"5.."}'),
                        rate('heed_requests_total{route=~"/v1/.*"}'),
                    ),
                    "failed",
                )
            ],
        ),
        number(
            "First token",
            "Within this long 95% of streamed replies began.",
            "below a second: people wait for it.",
            "above two seconds. Where the queue below is short the prompts are long, else there are too few rows.",
            "s",
            [Query(quantile(0.95, "heed_time_to_first_token_seconds"), "p95")],
        ),
        number(
            "Rows in use",
            "Share of the rows (HEED_MAX_ROWS of each server) in which a reply is being generated.",
            "below 0.8 when it is busiest.",
            "1 for minutes: replies wait for each other.",
            "percentunit",
            [Query(share("sum(heed_running_requests)", "sum(heed_rows_limit)"), "in use")],
        ),
        number(
            "Outbox",
            "Exchanges and feedback that wait on the servers' disks for a log that is away.",
            "0, always so with the log in the data folder.",
            "anything that stays: Kafka cannot be reached, and the learner does not see what people say.",
            "short",
            [Query("sum(heed_outbox_events)", "waiting")],
        ),
    ]


def traffic() -> list[Panel]:
    return [
        lines(
            "Requests",
            "Requests under /v1 answered a second, by route.",
            "follows the day of the people who use it.",
            "a fall to nothing, or a rise that your application does not explain.",
            "reqps",
            [Query(rate('heed_requests_total{route=~"/v1/.*"}', "route"), "{{route}}")],
            width=6,
        ),
        lines(
            "Refused and failed",
            "Requests answered with an error a second, by status.",
            "a few 4xx: clients make mistakes.",
            "429: more comes than there is room for (rows, or a key's quota). 503: loading, draining or a full outbox. "
            "500: a fault of ours.",
            "reqps",
            [Query(rate('heed_requests_total{status=~"4..|5..|other"}', "status"), "{{status}}")],
            width=6,
        ),
        lines(
            "Time to answer",
            "Within this long 95% of chats, and of feedback, were answered whole.",
            "feedback within some tens of milliseconds, chats within what their length explains.",
            "slow feedback: the disk, or Kafka, is slow to say that it is durable.",
            "s",
            [
                Query(
                    quantile(0.95, 'heed_request_seconds{route=~"/v1/chat/completions|/v1/feedback"}', "route"),
                    "{{route}}",
                )
            ],
            width=6,
        ),
        lines(
            "How replies end",
            "Replies a second, by why they ended: stop (by themselves), length (cut off), abort (the client went), error.",
            "nearly all stop.",
            "many length: clients ask for too few tokens, or the policy goes on and on. Many abort: people do not wait. Any "
            "error: see the server's log.",
            "short",
            [Query(rate("heed_replies_total", "reason"), "{{reason}}")],
            width=6,
        ),
    ]


def speed() -> list[Panel]:
    return [
        lines(
            "Time to first token",
            "From a streamed chat's arrival to its first token.",
            "p95 below a second.",
            "a p99 that rises with the queue (too few rows), or alone (long prompts, no prefix hits).",
            "s",
            quantiles("heed_time_to_first_token_seconds"),
        ),
        lines(
            "Between two tokens",
            "From one token of a streamed reply to its next.",
            "faster than people read: below 0.1 s.",
            "a p99 far above the p50: replies stand still now and then; where the learner shares the machine, see HEED_NICE.",
            "s",
            quantiles("heed_inter_token_seconds"),
        ),
        lines(
            "Queue",
            "From a chat's arrival until it is given a row.",
            "nothing to speak of.",
            "seconds: raise HEED_MAX_ROWS if memory allows, or add a server.",
            "s",
            quantiles("heed_queue_seconds"),
        ),
    ]


def room() -> list[Panel]:
    return [
        lines(
            "Rows",
            "Replies being generated, replies that wait for a row, and the rows that there are.",
            "running below the limit, none waiting.",
            "running at the limit and waiting above 0: beyond HEED_MAX_WAITING chats are refused with 429.",
            "short",
            [
                Query("sum(heed_running_requests)", "running"),
                Query("sum(heed_waiting_requests)", "waiting"),
                Query("sum(heed_rows_limit)", "limit"),
            ],
            width=6,
        ),
        lines(
            "Key/value room",
            "Share of the rows' room for keys and values that is in use, on each server.",
            "below 0.9.",
            "1 for minutes: conversations are long; HEED_MAX_MODEL_LEN bounds them.",
            "percentunit",
            [Query("heed_kv_usage_ratio", "{{instance}}")],
            width=6,
            top=1,
        ),
        lines(
            "Prompt tokens found already read",
            "Share of prompt tokens whose keys and values were remembered from an earlier prompt.",
            "high where people talk for several turns, or share a system prompt.",
            "0 with long conversations: HEED_PREFIX_TOKENS is too small. A fall after a swap is right: versions share nothing.",
            "percentunit",
            [Query(share(rate('heed_prefix_tokens_total{hit="yes"}'), rate("heed_prefix_tokens_total")), "found")],
            width=6,
            top=1,
        ),
        lines(
            "Tokens",
            "Tokens read (prompt) and said (reply) a second.",
            "in step with the requests.",
            "fewer reply tokens at the same number of chats: replies became shorter; was that wanted?",
            "short",
            [Query(rate("heed_tokens_total", "kind"), "{{kind}}")],
            width=6,
        ),
    ]


def versions() -> list[Panel]:
    return [
        lines(
            "Adapter slots",
            "Slots for adapters that are in use and free, on all servers.",
            "at least one free on each server: the next version is put there.",
            "none free for minutes: old replies do not end, and a new version waits for them.",
            "short",
            [Query("sum by (state) (heed_slots)", "{{state}}")],
            width=6,
        ),
        lines(
            "Swaps",
            "Versions that began to speak, and versions that could not.",
            "some activated after each release, none failed.",
            "failed: the server's log says what was wrong with the version; the one before goes on speaking.",
            "short",
            [Query(seen("heed_swaps_total", "outcome"), "{{outcome}}")],
            width=6,
        ),
        lines(
            "Swap time by phase",
            "Within this long 95% of the window's swaps passed each phase: load and stage beside the replies, warm, flip "
            "between two steps, drain until the last reply of the version before has ended.",
            "flip below a millisecond; nobody waits for the others.",
            "a flip above some milliseconds, which delays every reply; a drain of minutes, which keeps a slot.",
            "s",
            [Query(quantile(0.95, "heed_swap_seconds", "phase", "$window"), "{{phase}}")],
            width=6,
        ),
        lines(
            "Outbox and exchanges not kept",
            "Events that wait for a log that is away, on each server, and exchanges that could not even wait, a second.",
            "0 and 0.",
            "a line that grows: Kafka is away. Dropped: the outbox (HEED_OUTBOX_MB) or the disk is full, and nobody learns from "
            "those replies.",
            "short",
            [
                Query("heed_outbox_events", "waiting on {{instance}}"),
                Query(rate('heed_exchanges_total{outcome="dropped"}'), "dropped a second"),
            ],
            width=6,
        ),
    ]
