"""Many small requests take one round trip together: aiobotocore asks for them side by side."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.client import CONNECTIONS, prepare, s3_settings
from gradsharding.usage import carried, count


def read_all(bucket: str, places: Sequence[str]) -> list[bytes | BotoCoreError | ClientError]:
    """Read whole objects, in the order of ``places``; where one cannot be read, its error stands in its place."""
    with ThreadPoolExecutor(1, thread_name_prefix="gradsharding-fanout") as pool:  # the caller may itself run in an event loop
        return pool.submit(carried(asyncio.run), _read_all(bucket, places)).result()


async def _read_all(bucket: str, places: Sequence[str]) -> list[bytes | BotoCoreError | ClientError]:
    free = asyncio.Semaphore(CONNECTIONS)
    session = get_session()
    async with session.create_client("s3", config=AioConfig(**s3_settings(session, bucket))) as client:
        prepare(client)

        async def read(place: str) -> bytes | BotoCoreError | ClientError:
            async with free:
                try:
                    answer = await client.get_object(Bucket=bucket, Key=place)
                    async with answer["Body"] as body:
                        data: bytes = await body.read()
                        count("s3", bytes_read=len(data))
                except (BotoCoreError, ClientError) as error:
                    return error
            return data

        return await asyncio.gather(*map(read, places))
